"""The names of a workspace's folders and of the files that several modules write or read. Each name is written here once."""

# Folders of a workspace.
IMAGES, PROBE, TEACHER, PAIRS = "images", "probe", "teacher", "pairs"
STUDENTS, SWEEPS, EVALUATION = "students", "sweeps", "evaluation"


def pairs_folder(model: str) -> str:
    """The folder of the pairs that the model in folder `model` made: pairs/ for the teacher, else a folder in the model's."""
    return PAIRS if model == TEACHER else f"{model}/{PAIRS}"


def maker_of_pairs(folder: str) -> str | None:
    """The inverse of `pairs_folder`; None for a folder of another kind."""
    model, _, last = folder.rpartition("/")
    if last != PAIRS or model == STUDENTS:  # a student may be called "pairs"
        return None
    return model or TEACHER


# Files of a model's folder: weights, how to build the network, calibrated noise levels.
WEIGHTS, CONFIG, SOLVER = "model.safetensors", "config.json", "solver.json"

# Files of a stage's folder: its plan, and the marker of a complete stage.
PLAN, SUCCESS = "plan.json", "_SUCCESS"

# Contents of a training's folder: the log, checkpoints, the folder of TensorBoard's file.
LOG, CHECKPOINTS, TENSORBOARD = "train.jsonl", "checkpoints", "tensorboard"
