"""Training of a student from the weights of its teacher or of another student."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from beeline.checkpoint import build
from beeline.config import StudentConfig
from beeline.config.student import SCRATCH
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.labels import Subset
from beeline.noise import stream_seed
from beeline.objectives import Needs
from pipeline.model_folders import require_model
from pipeline.storage import Folder
from trainers import loop
from trainers.training import Training
from trainers.validation import Validation

PLAIN = Needs()


def student_training(
    *,
    session: loop.Session,
    workspace: Folder,
    recipe: str,
    config: StudentConfig,
    pairs: dict[str, Any] | None,
    images: dict[str, Any] | None,
    subset: Subset | None = None,
    task: type[Training] = Training,
) -> Training:
    """Build the training of a student from the weights in `config.init`. New weights depend on `config.seed` alone. `subset` is
    the one that it learns, if there are several."""

    def start() -> Denoiser:
        torch.manual_seed(stream_seed(config.seed, "student"))
        model, _ = require_model(workspace, config.start, recipe)
        new = config.init == SCRATCH
        student = start_from(model, needs=config.needs(), dropout=config.dropout, new=new)
        return student.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    validation = None
    if config.validate_every:
        assert images is not None
        validation = functools.partial(
            Validation, workspace, recipe, images, count=config.validate_count, seed=config.seed,
            classes=None if subset is None else subset.classes,
        )  # fmt: skip
    return task(
        session=session, workspace=workspace, recipe=recipe, config=config, start=start, pairs=pairs, images=images,
        validation=validation, subset=subset,
    )  # fmt: skip


def check_subsets(config: StudentConfig, num_classes: int) -> None:
    """Raise BeelineError for more subsets than classes; `num_classes` is 0 without classes."""
    if config.subsets > max(1, num_classes):
        found = f"{num_classes} classes" if num_classes else "no classes"
        raise BeelineError(
            f"student {config.name!r} has {config.subsets} subsets of classes, but {config.start} has {found}; set "
            f"--student.subsets to {max(1, num_classes)} or less"
        )


def check_start(name: str, model: Denoiser) -> None:
    """Raise BeelineError if `model`, in folder `name`, is a set of students: training starts from one network."""
    if model.parts > 1:
        raise BeelineError(
            f"{name} is a set of {model.parts} students, one for each subset of the classes; a student starts from one "
            f"network: take a model of all classes, or one of the parts, for example {name}/0"
        )


def check_phases(config: StudentConfig) -> None:
    """Raise BeelineError for a student without phases, and for phases whose optimisers cannot continue each other."""
    if not config.running:
        raise BeelineError(f"student {config.name!r} needs at least one phase with iterations above 0")
    kinds = list(dict.fromkeys(phase.optimizer.kind for phase in config.running.values()))
    if config.phase_switch == "continue" and len(kinds) > 1:
        raise BeelineError(
            f"the phases use the optimisers {' and '.join(kinds)}, and phase_switch is 'continue': one kind cannot use "
            "the moments of the other. Use the same kind in all phases, or set phase_switch to 'restart'"
        )


def start_from(init: Denoiser, *, needs: Needs = PLAIN, dropout: float = 0.0, new: bool = False) -> Denoiser:
    """A student with the network and the weights of `init`, or with `new` weights, ready to train, without the augmentation
    input.

    A student never gets augmentation labels: the weights of that input would have no gradient, which DDP refuses.
    The network gets the additional inputs of `needs`, and loses others. The last layer of a new input is 0, so that the
    student starts as `init`. The frozen network that makes a guess is `init`, or that of `init`.
    """
    assert init.network_config is not None
    assert init.parts == 1
    student = build(dataclasses.replace(init.network_config, dropout=dropout, augment_dim=0, **needs.inputs))
    weights = {} if new else init.state_dict()
    if student.guess is not None and init.guess is None:  # the model to start from makes the guess
        weights |= {f"guess.{name}": tensor for name, tensor in init.state_dict().items()}
    student.load_state_dict(student.state_dict() | {k: v for k, v in weights.items() if k in student.state_dict()})
    return student.train()
