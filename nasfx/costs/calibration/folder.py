"""The folder of a calibrated device, in nn-Meter's own format."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nasfx.costs import nnmeter
from nasfx.costs.calibration.regressor import LatencyRegressor
from nasfx.errors import ProfileError

RULES = "fusion_rules.json"
_META = "meta.yaml"


def check_folder(folder: Path) -> None:
    """Make the folder, unless it is there and empty or holds an earlier calibration.

    Raises:
        ProfileError: Something else is in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = sorted(folder.iterdir())
    except OSError as e:
        raise ProfileError(f"The folder {folder} cannot be made or read: {e}.") from e
    calibrated = (folder / _META).is_file() and (folder / RULES).is_file()
    if foreign := [path.name for path in inside if not (calibrated and _is_ours(path))]:
        raise ProfileError(
            f"{folder} holds {foreign[0]!r}, which is no part of a calibration. Give a new "
            "folder, or one that an earlier calibration has written."
        )


def _is_ours(path: Path) -> bool:
    return path.suffix == ".pkl" or path.name in (RULES, _META)


def write_rules(folder: Path, rules: Mapping[str, Any]) -> Path:
    """Write fusion_rules.json."""
    path = folder / RULES
    path.write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")
    return path


def write_folder(
    folder: Path,
    name: str,
    runtime: str,
    rules: Mapping[str, Any],
    predictors: Mapping[str, LatencyRegressor],
) -> None:
    """Write a folder that was checked: an earlier calibration in it is replaced.

    It holds one `<kernel>.pkl` each, fusion_rules.json, and the meta.yaml that `nn-meter register`
    takes.

    Raises:
        ProfileError: The folder cannot be written.
    """
    import yaml

    meta = {
        "name": name,
        "version": 1.0,
        "category": "cpu",
        "package_location": str(folder.absolute()),
        "kernel_predictors": sorted(predictors),
        "runtime": runtime,
    }
    try:
        for path in filter(_is_ours, list(folder.iterdir())):
            path.unlink()
        write_rules(folder, rules)
        for kind, predictor in predictors.items():
            (folder / f"{kind}.pkl").write_bytes(pickle.dumps(predictor, 4))
        (folder / _META).write_text(yaml.safe_dump(meta, sort_keys=False), encoding="utf-8")
    except OSError as e:
        raise ProfileError(f"The folder {folder} cannot be written: {e}.") from e


def register_predictor(folder: Path) -> None:
    """Add the folder to nn-Meter's list of predictors, as `nn-meter register` does.

    An entry of the same name is replaced.

    Raises:
        ProfileError: nn-Meter is missing, or its list or the folder cannot be read or written.
    """
    import yaml

    known = nnmeter.predictors()
    path = Path("~/.nn_meter/config/predictors.yaml").expanduser()
    try:
        entry = yaml.safe_load((folder / _META).read_text(encoding="utf-8"))
        known[entry["name"]] = entry
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(list(known.values()), sort_keys=False), encoding="utf-8")
    except (KeyError, OSError, TypeError, yaml.YAMLError) as e:
        raise ProfileError(f"{folder} cannot be registered in {path}: {e!r}.") from e
