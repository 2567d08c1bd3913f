"""Imports go downwards only, and optional heavy packages stay where the design puts them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pcam_automl"
LAYERS = (
    {"errors", "__init__", "waiting", "heap", "defaults", "cpu", "children", "collector"},
    {
        *(
            "files",
            "recipe",
            "recipe_files",
            "yaml_text",
            "config",
            "goals",
            "metrics",
            "intervals",
            "counter",
            "configs_folder",
            "versions",
            "interrupt",
        ),
        *("calibration", "operating", "paired", "clock"),
    },
    {"data", "augment", "colour", "crops", "batches", "models", "scores"},
    {"training", "bundle", "submission"},
    {"predict", "predict_dense", "ensemble", "explain", "search", "train", "compare", "lr_find"},
    {"finalize", "finalizing", "dashboard", "terminal", "report", "service", "workers_board"},
    {"commands"},
    {"command_line"},
    {"cli", "__main__"},
)
HOMES = {
    "optuna": {"search", "dashboard", "commands", "finalize", "finalizing", "report"},
    "timm": {"models"},
    "h5py": {"data"},
    "tifffile": {"data"},
    "matplotlib": {"report", "explain"},
    "captum": {"explain"},
}
"""Where a package may be imported; commands and finalize read Optuna's trials."""


def layer_of(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imports_of(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_downwards(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports_of(file):
        package, _, rest = name.partition(".")
        if package == "pcam_automl" and rest:
            other = rest.split(".")[0]
            allowed = layer_of(other) <= layer_of(own) if own != other else True
            assert allowed, f"{file.name} (layer {layer_of(own)}) imports {name} (layer {layer_of(other)})"
        elif package in HOMES:
            assert own in HOMES[package], f"{file.name} imports {package}"


def test_report_reads_optuna_in_two_modules_only() -> None:
    found = {
        f.stem for f in (PACKAGE / "report").glob("*.py") if any(n.split(".")[0] == "optuna" for n in imports_of(f))
    }
    assert found == {"artifacts", "search_figures"}


def test_no_module_uses_matplotlibs_global_state() -> None:
    for file in MODULES:
        assert not {name for name in imports_of(file) if name.startswith(("matplotlib.pyplot", "pylab"))}, file.name


def test_data_layer_imports_no_torch() -> None:
    for file in (PACKAGE / "data").rglob("*.py"):
        assert not {name for name in imports_of(file) if name.split(".")[0] in ("torch", "timm", "optuna")}


def test_nothing_unpickles() -> None:
    for file in MODULES:
        text = file.read_text(encoding="utf-8")
        assert "import pickle" not in text
        assert "torch.load(" not in text
        assert "allow_pickle=True" not in text
