"""All that is peculiar to nn-Meter 2.0, an unmaintained package, in one place.

It is used for its ONNX converter, its kernel detector, its features and its download. Predictors
are read and kernels are priced here, because nn-Meter unpickles whatever it finds and leaves out,
without a word, the kernels that it has no predictor for. Where its features describe another kernel
than the one in the file, the price is refused or annotated (see `price`).
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import logging
import math
import re
import sys
import types
import warnings
import zipfile
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nasfx.costs.kernels import OWN, element_counts, groups_of, own_predictor
from nasfx.costs.predictors import predict
from nasfx.errors import ProfileError
from nasfx.reading import read_json, read_yaml, shown

# Types that nn-Meter lacks, or (Identity) that it drops and then looks up again.
_TYPES = {"HardSwish": "hswish", "Identity": "identity", "Placeholder": "placeholder"}
_SPATIAL = {2, 3, -2, -1}
_RULES = "fusion_rules.json"
_KERNEL = re.compile(r"\w[\w.+-]*")  # no name of a file elsewhere


@dataclass(frozen=True)
class Kernel:
    """One kernel that the hardware runs, and its predicted latency.

    Attributes:
        type: nn-Meter's name of it, such as "conv-bn-relu".
        nodes: The names of the ONNX nodes in it.
        macs: Multiply-accumulates of its convolutions and matrix products, for one sample.
        features: What the predictor was asked about; empty if nn-Meter has no features for it.
        milliseconds: The prediction, or None.
        reason: Why there is none, or what to know about it; else empty.
        modules: Of each node the path of the user's module, "" where the file does not say.
        choices: Of each node the choice that it stands in and its decision, "block: conv3", or "".
    """

    type: str
    nodes: tuple[str, ...]
    macs: int
    features: tuple[float, ...]
    milliseconds: float | None
    reason: str = ""
    modules: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


class _Item(dict[str, Any]):
    """A kernel's configuration whose keys are attributes too.

    nn-Meter looks for the height of a global pooling with hasattr() on a dictionary, never finds it
    and takes 1, while its predictors are fitted on the real height.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def _pkg_resources() -> types.ModuleType:
    """The three functions of the retired pkg_resources that nn-Meter calls."""

    def require(name: str) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(version=importlib.metadata.version(name))]

    def resource_filename(package: str, name: str) -> str:
        return str(importlib.resources.files(package) / name)

    def resource_listdir(package: str, name: str) -> list[str]:
        return [entry.name for entry in (importlib.resources.files(package) / name).iterdir()]

    module = types.ModuleType("pkg_resources")
    for function in (require, resource_filename, resource_listdir):
        setattr(module, function.__name__, function)
    return module


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep nn-Meter from logging, from warning and from configuring the root logger."""
    logger, root = logging.getLogger("nn-Meter"), logging.getLogger()
    disabled, guard = logger.disabled, logging.NullHandler()
    # It calls logging.info(), which installs a handler on a root logger that has none.
    root.addHandler(guard)
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
        root.removeHandler(guard)


def import_nnmeter() -> Any:
    """Import nn-Meter, which makes ~/.nn_meter/config where that is missing.

    Raises:
        ProfileError: If it is not installed or does not import.
    """
    if (loaded := sys.modules.get("nn_meter")) is not None:
        return loaded
    shim = importlib.util.find_spec("pkg_resources") is None
    try:
        with _quiet():
            if shim:
                sys.modules["pkg_resources"] = _pkg_resources()
            try:
                return importlib.import_module("nn_meter")
            finally:
                if shim:  # nn-Meter keeps its own reference; nobody else is to find a fake
                    sys.modules.pop("pkg_resources", None)
    except (ImportError, OSError) as error:
        raise ProfileError(
            f"Latency is predicted by nn-Meter, which does not import here: {error}. "
            "Install it by: pip install nasfx[latency]"
        ) from error


def _config(name: str) -> Path:
    return Path("~/.nn_meter/config").expanduser() / name


def _read_config(name: str, default: Any) -> Any:
    # Read here and not by nn-Meter, which fixes the home folder for good when it is imported.
    path = _config(name)
    try:
        content = read_yaml(path) if path.is_file() else default
    except (OSError, ValueError) as error:
        raise ProfileError(f"nn-Meter's configuration {path} cannot be read: {error}.") from error
    if not isinstance(content, type(default)):
        raise ProfileError(f"nn-Meter's configuration {path} does not hold what it should.")
    return content


def predictors() -> dict[str, dict[str, Any]]:
    """The entries of nn-Meter's list of predictors, built in and registered, the latest of a name.

    Raises:
        ProfileError: If nn-Meter does not import or its configuration cannot be read.
    """
    import_nnmeter()
    import yaml
    from packaging.version import InvalidVersion, Version

    packaged = importlib.resources.files("nn_meter") / "configs" / "predictors.yaml"
    entries = _read_config("predictors.yaml", yaml.safe_load(packaged.read_text(encoding="utf-8")))
    latest: dict[str, tuple[Version, dict[str, Any]]] = {}
    for entry in entries:
        try:
            name, version = str(entry["name"]), Version(str(entry.get("version", 0)))
        except (AttributeError, InvalidVersion, KeyError, TypeError) as error:
            raise ProfileError(
                f"An entry of {_config('predictors.yaml')} is damaged: {entry!r}. "
                "Correct it, or remove the file for nn-Meter's own list."
            ) from error
        if name not in latest or latest[name][0] <= version:
            latest[name] = version, entry
    return {name: entry for name, (_, entry) in latest.items()}


def _is_complete(folder: Path) -> bool:
    return (folder / _RULES).is_file() and any(folder.glob("*.pkl"))


def _given_folder(folder: Path) -> Path:
    listed: Any = []
    try:
        if (folder / "meta.yaml").is_file():
            listed = read_yaml(folder / "meta.yaml")["kernel_predictors"]
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ProfileError(f"{folder / 'meta.yaml'} is damaged: {error!r}.") from error
    if not isinstance(listed, list) or not all(
        isinstance(kernel, str) and _KERNEL.fullmatch(kernel) for kernel in listed
    ):
        raise ProfileError(
            f"{folder / 'meta.yaml'} is damaged: its kernel_predictors are {shown(listed)}, "
            "and no list of names."
        )
    files = [_RULES, *(f"{kernel}.pkl" for kernel in listed)]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not _is_complete(folder):
        raise ProfileError(
            f"The folder {folder} does not hold the predictors of a device: there is no "
            f"{', '.join(missing) or '<kernel>.pkl'}. Calibrate it again."
        )
    return folder.absolute()


def predictor_folder(hardware: str | Path) -> Path:
    """The folder with the predictors of `hardware`, downloaded by nn-Meter if they are not there.

    Args:
        hardware: A name that nn-Meter knows, or a folder with predictors, such as `calibrate`
            writes. A name that is both is nn-Meter's.

    Raises:
        ProfileError: If the name is unknown, or the files are missing and do not download.
    """
    known = predictors()
    if hardware not in known and Path(hardware).is_dir():
        return _given_folder(Path(hardware))
    if hardware not in known:
        hardware = str(hardware)
        near = difflib.get_close_matches(hardware, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ProfileError(
            f"nn-Meter has no predictor named {hardware!r}.{hint} Known: {', '.join(known)}. "
            "Add one of your own by: nn-meter register --predictor <meta.yaml>, or by an entry in "
            f"{_config('predictors.yaml')}. A folder with predictors is named by its path."
        )
    entry = known[str(hardware)]
    kernels = [str(kernel) for kernel in entry.get("kernel_predictors") or ()]
    files = ", ".join([*(f"{kernel}.pkl" for kernel in kernels), _RULES])
    if "download" not in entry:
        folder = Path(str(entry.get("package_location", ""))).expanduser().absolute()
        if not _is_complete(folder):
            raise ProfileError(
                f"The registered predictor {hardware!r} is not in its folder {folder}: "
                f"it must hold {files}."
            )
        return folder
    fallback = {"data_folder": "~/.nn_meter/data"}
    data = _read_config("settings.yaml", fallback).get("data_folder") or fallback["data_folder"]
    parent = Path(str(data)).expanduser().absolute() / "predictor"
    folder = parent / str(hardware)
    if _is_complete(folder):
        return folder
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # of its progress bar
            import_nnmeter().download_from_url(entry["download"], str(parent))
        failure = "the archive does not hold them"
    except (OSError, zipfile.BadZipFile) as error:  # requests' own errors are OSErrors
        failure = f"{type(error).__name__}: {error}"
        (parent / ".zip").unlink(missing_ok=True)  # nn-Meter leaves half a download behind
    if not _is_complete(folder):
        raise ProfileError(
            f"The predictors of {hardware!r} could not be downloaded ({failure}). nn-Meter "
            f"publishes them as {entry['download']}: unpack that into {parent}, so that the folder "
            f"{folder} holds {files}."
        )
    return folder


def _pools_space(node: Any, initializers: Mapping[str, Any]) -> bool:
    import onnx

    axes = [a for attribute in node.attribute if attribute.name == "axes" for a in attribute.ints]
    if len(node.input) > 1 and node.input[1] in initializers:
        if initializers[node.input[1]].data_location == onnx.TensorProto.EXTERNAL:
            return False  # onnx would read whatever file the model names
        axes = onnx.numpy_helper.to_array(initializers[node.input[1]]).tolist()
    return len(axes) == 2 and set(axes) <= _SPATIAL


def _convert(model: Any) -> dict[str, dict[str, Any]]:
    """nn-Meter's graph of `model`, whose nodes have unique names, and without what breaks it."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    # Weights listed as inputs too (files of before IR version 4) would be taken for activations.
    # So would those whose shapes are noted, which gives a mean an input more: its axes.
    for values in (model.graph.input, model.graph.value_info):
        for index in reversed(range(len(values))):
            if values[index].name in initializers:
                del values[index]
    nodes = {node.name: node for node in model.graph.node}
    converted = import_nnmeter().model_to_graph(model, "onnx")
    graph = {name: item for name, item in converted.items() if "type" in item["attr"]}
    # Of the slices of one tensor nn-Meter keeps the first and loses who reads the others.
    first = {nodes[n].input[0]: n for n in reversed(graph) if nodes[n].op_type == "Slice"}
    for name, item in list(graph.items()):
        node, attributes = nodes[name], item["attr"]["attr"]
        item["inbounds"] = [
            n if n in graph or nodes[n].op_type != "Slice" else first.get(nodes[n].input[0], n)
            for n in item["inbounds"]
        ]
        item["attr"]["type"] = _TYPES.get(node.op_type, node.op_type)
        if node.op_type == "ReduceMean" and not _pools_space(node, initializers):
            item["attr"]["type"] = "reducemean"
        if attributes.get("group") == 1:
            # Else a convolution of a one-channel image counts as depthwise.
            del attributes["group"]
    read = {n for item in graph.values() for n in item["inbounds"] if n in graph}
    for name in [n for n in graph if n not in read and not set(graph[n]["inbounds"]) & set(graph)]:
        # nn-Meter drops nodes without neighbours, so a lone node is given one.
        attr = {"type": "sink", "attr": {}, "input_shape": [], "output_shape": []}
        graph[f"{name}.sink"] = {"attr": attr, "inbounds": [name], "outbounds": []}
    return graph


def _members(block: Sequence[str], left: Mapping[str, Any]) -> tuple[str, ...]:
    # A block such as hard-swish is one node by then, named after its parts.
    names = {name for node in block for name in node.split(";") if name in left}
    # nn-Meter folds the slices of one tensor into the first of them.
    sliced = {left[name].input[0] for name in names if left[name].op_type == "Slice"}
    return tuple(
        name
        for name, node in left.items()
        if name in names or (node.op_type == "Slice" and node.input[0] in sliced)
    )


def _described(predictor: str, features: Sequence[float]) -> int | None:
    """The MACs of the kernel that the features describe, where they describe any."""
    if predictor == "fc":
        return int(features[0] * features[1])
    if predictor not in ("conv-bn-relu", "dwconv-bn-relu"):
        return None
    height, cin, cout, size, stride = features[:5]
    channels = cout if predictor == "dwconv-bn-relu" else cin * cout
    return int(channels * size * size * math.ceil(height / stride) ** 2)


def _describe(item: Mapping[str, Any], macs: int) -> tuple[str, tuple[float, ...], str, bool]:
    """The predictor's name, the features, what to know, and whether a prediction is meaningful."""
    from nn_meter.predictor.prediction.extract_feature import get_predict_features
    from nn_meter.predictor.prediction.utils import get_kernel_name

    name = str(get_kernel_name(item["op"]))
    try:
        found = get_predict_features([_Item(item)])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        return name, (), f"nn-Meter cannot read its features: {type(error).__name__} {error}", False
    if not found:
        return name, (), "nn-Meter has no features for it", False
    features = tuple(float(value) for value in found[0][item["op"]])
    described = _described(name, features)
    if described is None:
        return name, features, "", True
    if macs > 1.1 * described:
        return name, features, f"nn-Meter takes it for one of {described:,} MACs only", False
    if described > 1.5 * macs:
        return name, features, f"priced as if it had {described:,} MACs", True
    return name, features, "", True


def _identify(
    item: Mapping[str, Any],
    node: Any,
    macs: int,
    own: Collection[str],
    sizes: Mapping[str, float],
) -> tuple[str, tuple[float, ...], str, bool]:
    """As `_describe`, by a predictor in `own` where nn-Meter's features do not fit the kernel."""
    found = name, _, _, meaningful = _describe(item, macs)
    # nn-Meter takes a transposition for an "se", by its name.
    fits = meaningful and node.op_type != "Transpose"
    if node.op_type == "Conv":
        fits = name != "conv-bn-relu" or groups_of(node) == 1
    if fits or not own:
        return found
    mine, features = own_predictor(item, node, sizes)
    return (mine, features, "", True) if mine in own else found


def split(
    model: Any, macs: Mapping[str, int], rules: Path, own: Collection[str]
) -> list[tuple[Kernel, str]]:
    """Split an ONNX model into kernels without a price, each with the name of its predictor.

    Args:
        model: As in `price`.
        macs: As in `price`.
        rules: The file fusion_rules.json.
        own: The predictors of nasfx's own that there are, whose names start with `kernels.OWN`.

    Returns:
        The kernels as in `price`; the name is empty where there can be no meaningful prediction.

    Raises:
        ProfileError: If nn-Meter cannot read the model, or the rules are damaged.
    """
    import_nnmeter()
    from nn_meter.kernel_detector import KernelDetector

    try:
        read_json(rules)  # nn-Meter's own reader knows no bounds
        with _quiet():
            detector = KernelDetector(str(rules))
    except Exception as error:  # nn-Meter takes the rules as they are
        raise ProfileError(
            f"The fusion rules {rules} are damaged: {type(error).__name__}: {error}."
        ) from error
    try:
        with _quiet():
            return _kernels(model, macs, detector, own)
    except Exception as error:  # nn-Meter fails by whatever its dictionaries and graphs raise
        raise ProfileError(
            f"nn-Meter cannot split the model into kernels: {type(error).__name__}: {error}."
        ) from error


def _kernels(
    model: Any, macs: Mapping[str, int], detector: Any, own: Collection[str]
) -> list[tuple[Kernel, str]]:
    """As `split`, by a detector with rules."""
    nodes_of, sizes = {node.name: node for node in model.graph.node}, element_counts(model)
    left = dict(nodes_of)
    detector.load_graph(_convert(model))
    found: list[tuple[Kernel, str]] = []
    for item in detector.get_kernels():
        # The number in a kernel's name is that of its block of nodes.
        nodes = _members(detector.bbs[int(item["name"].rsplit("#", 1)[1])], left)
        if not nodes:
            continue  # a sink of our own
        for name in nodes:
            del left[name]
        total = sum(macs.get(name, 0) for name in nodes)
        predictor, features, reason, fits = _identify(item, nodes_of[nodes[0]], total, own, sizes)
        kernel = Kernel(item["op"], nodes, total, features, None, reason)
        found.append((kernel, predictor if fits else ""))
    why = "nn-Meter's graph leaves it out"
    for name, node in left.items():
        found.append((Kernel(node.op_type.lower(), (name,), macs.get(name, 0), (), None, why), ""))
    return found


def price(model: Any, macs: Mapping[str, int], folder: Path) -> list[Kernel]:
    """Split an ONNX model into kernels and price each, dropping none.

    A kernel stays unpriced if there is no predictor or no feature for it, or if nn-Meter's features
    describe a smaller kernel than it is (a matrix product of many rows). A larger one (a grouped
    convolution, which nn-Meter takes for a dense one) is priced and annotated: an upper bound. A
    calibrated folder has predictors of its own for such kernels.

    Args:
        model: An `onnx.ModelProto` with inferred static shapes of batch 1 and unique node names
            without ";"; it is changed.
        macs: The multiply-accumulates of each node, by name; no entry means none.
        folder: Predictors as `<kernel>.pkl`, and fusion_rules.json.

    Returns:
        The kernels in topological order, then the nodes that nn-Meter's graph leaves out.

    Raises:
        ProfileError: If nn-Meter cannot read the model, or the folder's files are damaged.
    """
    own = {path.stem for path in folder.glob(f"{OWN}*.pkl")}
    kernels: list[Kernel] = []
    rows: dict[str, list[int]] = {}
    for kernel, predictor in split(model, macs, folder / _RULES, own):
        if predictor and not (folder / f"{predictor}.pkl").is_file():
            kernel = replace(kernel, reason=f"no {predictor}.pkl among the predictors")
        elif predictor:
            rows.setdefault(predictor, []).append(len(kernels))
        kernels.append(kernel)
    for predictor, indices in rows.items():
        values = predict(folder / f"{predictor}.pkl", [kernels[i].features for i in indices])
        for i, value in zip(indices, values, strict=True):
            kernels[i] = replace(kernels[i], milliseconds=value)
    return kernels
