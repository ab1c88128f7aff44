"""Build the dashboard beeline.json from the tables below: `python cluster/grafana/dashboard.py` writes it.

Ray's series label the node as `ip`, Beeline's own (prometheus.py) as `NodeAddress`. A restarted run continues in another
process; `max by` keeps its line in one piece. A gauge disappears soon after its process, and counters with their node, so
values that must stay visible are queried over the whole time range shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "beeline.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT, LINE = 3, 8, 24  # panels side by side, and Grafana's units
FIGURE = 'ray_beeline_training_figure{model=~"$model", figure%s}'
LOSSES = '!~"lambda|phase|.*grad_norm|.*positive|fd_.*"'  # the rest are the objective's losses, under any name


class Panel(NamedTuple):
    """A panel. `queries` are (PromQL, legend); `kind` is Grafana's panel type."""

    title: str
    unit: str
    queries: list[tuple[str, str]]
    kind: str = "timeseries"
    description: str = ""


def of_training(figure: str) -> str:
    """Query a figure of training runs, one line per run."""
    return f"max by (model, figure) ({FIGURE % figure})"


def rate(by: str, counter: str) -> str:
    """Query the rate of one of Beeline's counters, per second."""
    return f'sum by ({by}) (rate(ray_beeline_{counter}_total{{NodeAddress=~"$node"}}[$window]))'


def total(counter: str) -> str:
    """Query a counter at the end of the time range, including nodes that have left."""
    return f'sum by (worker) (max_over_time(ray_beeline_{counter}_total{{NodeAddress=~"$node"}}[$__range]))'


def of_node(series: str) -> str:
    """Query one of Ray's gauges of machines."""
    return f'max by (ip) (ray_node_{series}{{ip=~"$node"}})'


def of_gpu(series: str) -> str:
    """Query one of Ray's gauges of GPUs, which only machines with a GPU have."""
    return f'max by (ip, GpuIndex) (ray_node_{series}{{ip=~"$node"}})'


def of_run(series: str) -> str:
    """Query a gauge of training runs."""
    return f'max by (model) (ray_beeline_training_{series}{{model=~"$model"}})'


NODE, RUN, GPU = "{{NodeAddress}}", "{{model}}", "{{ip}} GPU {{GpuIndex}}"
BUSY = f"({rate('NodeAddress', 'waiting_seconds')} + {rate('NodeAddress', 'sampling_seconds')})"
EVALUATED = 'max by (model, sampler, metric) (last_over_time(ray_beeline_evaluation_figure{model=~"$judged"%s}[$__range]))'
ROWS = {
    "Pairs": [
        Panel("Pairs by node", "suffix: pairs/s", [(rate("NodeAddress", "pairs"), NODE)]),
        Panel(
            "Samplers' time waiting", "percentunit", [(f"{rate('NodeAddress', 'waiting_seconds')} / {BUSY}", NODE)],
            description="Share of the time in which the sampler of an actor has nothing to do.",
        ),
        Panel("Requests repeated", "short", [(rate("NodeAddress", "retries") + " * 60", NODE)], description="Per minute."),
        Panel("Network evaluations", "suffix: /s", [(rate("worker", "evaluations"), "{{worker}}")]),
        Panel(
            "Published", "Bps", [(rate("NodeAddress", "bytes"), NODE)],
            description="Bytes of shards of pairs that reach the workspace.",
        ),
        Panel(
            "Publishing", "suffix: actors", [(rate("NodeAddress", "writing_seconds"), NODE)],
            description="Actors that are publishing a shard, on average; they sample the next one meanwhile.",
        ),
    ],
    "Cost": [
        Panel("Actor-hours", "h", [(total("actor_seconds") + " / 3600", "{{worker}}")], "stat"),
        Panel(
            "Cost", "none", [(total("cost"), "{{worker}}")], "stat",
            "Of actors, where the settings say what an hour costs (--pairs.price), in the currency of that price.",
        ),
        Panel("Cost per hour", "none", [(rate("worker", "cost") + " * 3600", "{{worker}}")]),
    ],
    "Training": [
        Panel("Losses", "none", [(of_training(LOSSES), "{{model}} {{figure}}")]),
        Panel(
            "Lambda", "none", [(of_training('="lambda"'), RUN)],
            description="The adaptive weight of the adversarial term.",
        ),
        Panel("Distance in training", "none", [(of_training('=~"fd_.*"'), "{{model}} {{figure}}")]),
        Panel("Images", "suffix: images/s", [(of_run("images_per_second"), RUN)]),
        Panel("Time waiting for data", "percentunit", [(of_run("waiting_ratio"), RUN)]),
        Panel("Gradient norms", "none", [(of_training('=~".*grad_norm"'), "{{model}} {{figure}}")]),
        Panel(
            "Discriminator", "percentunit", [(of_training('=~".*positive"'), "{{model}} {{figure}}")],
            description="Shares of its logits that are positive, for real and for generated images.",
        ),
        Panel("Peak memory", "bytes", [(of_run("peak_bytes"), RUN)]),
        Panel("Steps", "short", [(of_run("step"), RUN), (of_run("skipped"), f"{RUN}, skipped")]),
    ],
    "Evaluation and sweeps": [
        Panel("Samples measured", "suffix: images/s", [(rate("NodeAddress", "samples"), NODE)]),
        Panel(
            "Distances of models", "none",
            [(EVALUATED % ', metric=~"(fid|fd|kid)_.*"', "{{model}} {{sampler}} {{metric}}")], "bargauge",
        ),
        Panel(
            "Trials", "short", [('max by (sweep, state) (ray_beeline_sweep_trials)', "{{sweep}} {{state}}")],
            description="Their distances are above: they are models named sweeps/<name>/trials/<number>.",
        ),
        Panel("Figures of models", "none", [(EVALUATED % "", "")], "table"),
    ],
    "Machines": [
        Panel("GPU utilisation", "percent", [(of_gpu("gpus_utilization"), GPU)]),
        Panel("GPU memory", "mbytes", [(of_gpu("gram_used"), GPU), (of_gpu("gram_available"), f"{GPU}, free")]),
        Panel("CPU utilisation", "percent", [(of_node("cpu_utilization"), "{{ip}}")]),
        Panel("Memory", "bytes", [(of_node("mem_used"), "{{ip}}"), (of_node("mem_total"), "{{ip}}, all")]),
        Panel(
            "Network", "Bps",
            [(of_node("network_receive_speed"), "{{ip}} in"), (of_node("network_send_speed"), "{{ip}} out")],
        ),
        Panel("Actors", "short", [('sum by (Name) (ray_actors{State="ALIVE"})', "{{Name}}")]),
    ],
}  # fmt: skip
# For each variable: the series and the label whose values it lists.
VARIABLES = {
    "node": ("ray_node_cpu_utilization", "ip"),
    "model": ("ray_beeline_training_step", "model"),
    "judged": ("ray_beeline_evaluation_figure", "model"),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard for Grafana 10 and later."""
    panels: list[dict[str, Any]] = []
    top = 0
    for name, row in ROWS.items():
        panels.append(_placed(len(panels), 0, top, LINE, 1, {"type": "row", "title": name, "collapsed": False, "panels": []}))
        top += 1
        width = LINE // COLUMNS
        for number, panel in enumerate(row):
            left, line = number % COLUMNS, number // COLUMNS
            panels.append(_placed(len(panels), left * width, top + line * HEIGHT, width, HEIGHT, _panel(panel)))
        top += -(-len(row) // COLUMNS) * HEIGHT
    windows = ["1m", "5m", "15m", "1h"]
    options = [{"text": window, "value": window, "selected": window == "5m"} for window in windows]
    window = {"name": "window", "label": "rates over", "type": "custom", "query": ",".join(windows), "options": options}
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 2},
        *(_variable(name, series, label) for name, (series, label) in VARIABLES.items()),
        window | {"current": {"text": "5m", "value": "5m"}},
    ]
    return {
        "uid": "beeline",
        "title": "Beeline",
        "tags": ["beeline", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }


def _placed(number: int, x: int, y: int, width: int, height: int, panel: dict[str, Any]) -> dict[str, Any]:
    return {"id": number + 1, "gridPos": {"x": x, "y": y, "w": width, "h": height}} | panel


def _panel(panel: Panel) -> dict[str, Any]:
    at_once = panel.kind != "timeseries"
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": expr,
            "legendFormat": legend or "__auto",
            "instant": at_once,
            "range": not at_once,
        }
        | ({"format": "table"} if panel.kind == "table" else {})
        for number, (expr, legend) in enumerate(panel.queries)
    ]
    result = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, **({"decimals": 2} if panel.kind == "stat" else {})}, "overrides": []},
        "targets": targets,
    }
    if panel.kind == "timeseries":
        result["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "table":
        result["transformations"] = [{"id": "organize", "options": {"excludeByName": {"Time": True}}}]
    return result


def _variable(name: str, series: str, label: str) -> dict[str, Any]:
    query = f"label_values({series}, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # whenever the time shown changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
