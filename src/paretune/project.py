"""`paretune.yaml`: a project's settings, written by `init`, read by every command run in its folder.

Relative paths in it start from the folder that it lies in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .default_paths import LEDGER, PROFILE
from .profiler.table_choice import INSTALLED, TableChoice
from .runtime.safe_yaml import BadYaml, load_yaml
from .runtime.spec import SMALL_MODEL

FILE_NAME = "paretune.yaml"
_PATHS = (
    "log", "model", "profile", "calibration", "operator_tables", "layer_times", "step_times", "tiles", "prices",
    "space", "spec", "storage", "decisions",
)  # fmt: skip

_NO_PATHS = (SMALL_MODEL, INSTALLED)


class Project(BaseModel):
    """What the commands take where no flag and no PARETUNE_* variable says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    log: str = Field("trace.parquet", description="the request log that `retune` reads every night")
    model: str = Field(SMALL_MODEL, description="model directory, or the small model that ships with the package")
    slo: tuple[str, ...] = Field((), description="what must hold, such as ttf30:p95<=600ms")
    metric: str = Field("ttf30:p95", description="the latency axis of the curve")
    cost: Literal["capacity", "sizing"] = "capacity"
    survive: int = Field(0, ge=0, description="replicas that may be lost with `slo` still held; of cost sizing")
    accelerator: str = "cpu"
    profile: str = PROFILE
    calibration: str | None = None
    operator_tables: str | None = Field(None, description="measured operators for an accelerator's data sheet")
    layer_times: str | None = Field(None, description="layer times of vLLM for it")
    step_times: str | None = Field(None, description="whole steps for it")
    tables_engine: str | None = Field(
        None, description="whose kernels, of aiconfigurator's operator tables; none: vllm's"
    )
    tables_version: str | None = None
    tiles: str | None = None
    prices: str | None = None
    space: str | None = None
    spec: str = Field("out/spec.yaml", description="the deployment that runs; `retune` replaces it")
    storage: str = LEDGER
    decisions: str = Field("out/decisions", description="folder for the record of each decision of `retune`")
    study: str = "default"
    trials: int = Field(200, ge=1)
    measure: int = Field(0, ge=0, description="finalists to serve and replay for real")

    @property
    def tables(self) -> TableChoice:
        """What takes the place of the accelerator's data sheet."""
        return TableChoice(
            self.operator_tables, self.layer_times, self.step_times, self.tables_engine, self.tables_version
        )


def load_project(path: str | Path = FILE_NAME) -> Project:
    """Read the settings, paths as they are seen from here. Raises: BadYaml, naming the field; OSError."""
    data = load_yaml(path)
    try:
        project = Project.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BadYaml(f"{Path(path).name}: {field}", first.get("input"), first["msg"]) from None
    folder = Path(path).parent
    given = {name: value for name in _PATHS if (value := getattr(project, name)) is not None}
    named = {name: value for name, value in given.items() if value not in _NO_PATHS and "://" not in value}
    paths = {name: str(folder / value) for name, value in named.items()}
    return project.model_copy(update=paths)


def defaults(project: Project) -> dict[str, dict[str, Any]]:
    """The settings as defaults of the commands' options (click's default_map)."""
    study = {"storage": project.storage, "study": project.study}
    sources = {"model": project.model, "accelerator": project.accelerator, "profile_path": project.profile}
    tables = {
        name: value
        for name in ("operator_tables", "layer_times", "step_times", "tables_engine", "tables_version")
        if (value := getattr(project, name)) is not None
    }
    corrected = {} if project.calibration is None else {"calibration_path": project.calibration}
    tune = {
        **study,
        **sources,
        **tables,
        "slos": list(project.slo),
        "metric": project.metric,
        "cost": project.cost,
        "survive": project.survive,
        "tiles_path": project.tiles,
        "prices_path": project.prices,
        "calibration_path": project.calibration,
        "space_path": project.space,
        "trials": project.trials,
        "finalists": project.measure,
    }
    given = {name: value for name, value in tune.items() if value is not None}
    return {
        "tune": given,
        "front": study,
        "pick": {**study, "output": project.spec},
        "report": study,
        "simulate": {"profile_path": project.profile, **corrected, **tables},
        "explain": {"profile_path": project.profile, **corrected, **tables},
        "calibrate": {"profile_path": project.profile, **tables},
        "profile": {"run": {"model": project.model, "output": project.profile}},
        "kernels": {"tune": {"model": project.model}},
    }


TEMPLATE = f"""\
# Settings of this folder's paretune commands; a flag or a PARETUNE_* variable goes before them.
schema_version: 1
log: {{log}}            # the request log that `paretune retune` reads every night
model: paretune/small         # a Hugging Face model directory (config.json, safetensors, tokenizer.json)
slo: ['ttf30:p95<=1500ms']    # what must hold
metric: ttf30:p95             # the latency axis of the curve
profile: {PROFILE}     # measured step times: paretune profile run
spec: out/spec.yaml           # the deployment that runs; `paretune retune` replaces it
storage: {LEDGER}      # the ledger of every study
trials: 200
measure: 4                    # finalists to serve and replay for real
"""
