"""What comes with a model is data: none of its code is run, no pickle read, no link followed out.

transformers runs a model's own code only where it is told to; but configurations have told it so
themselves (CVE-2026-4372, CVE-2026-5241). So they are looked through, at every depth, before the
library sees them, and what names code is refused, whatever the library would make of it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from transformers.utils.hub import cached_file

from benchmarks import links

CONFIGS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
INDEX: Final = "model.safetensors.index.json"
ADAPTER: Final = "adapter_config.json"
CODE: Final = frozenset({"auto_map", "trust_remote_code", "custom_pipelines"})
"""Keys that name code, or ask for it to be run."""
KERNELS: Final = re.compile("implementation|kernel")
"""Keys that may name a repository of compiled code, as `org/name`."""
INSTEAD: Final = frozenset({"configuration_files", "fast_tokenizer_files"})
"""Keys that name files to be read in place of the usual ones, by version of the library."""
WEIGHTS: Final = "transformers_weights"
"""The key of a configuration that names the file of the weights."""
PICKLES: Final = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


class Untrusted(ValueError):
    """What comes with a model is more than data; the message says what, and where."""


def check(source: str | Path, **hub: Any) -> None:
    """Look through what lies around the weights of a folder or a hub id.

    Args:
        source: the folder or the hub id.
        hub: where the files are looked for: `revision`, `subfolder` and the like.

    Raises:
        Untrusted: a configuration names code, or files to read in its place, weights lie elsewhere
            or in a pickle, a link leads out of the folder, there is an adapter, or a file cannot be
            read.
    """
    folder = Path(source)
    if folder.is_dir():
        for path in links.leading_out(folder):
            raise Untrusted(
                f"{path}: found a link to {path.resolve()}, expected a plain file: links that lead"
                " out of a model's folder are not followed; copy the file here"
            )
    for name in CONFIGS:
        config, where = _read(source, name, hub), f"{source}/{name}"
        refuse_code(config, where)
        for key in sorted(INSTEAD & config.keys()):
            raise Untrusted(
                f"{where}: found {key}: {_short(config[key])}, which names files to read instead of"
                " those that are looked through, expected none; take the key out"
            )
    index: Any = _read(source, INDEX, hub).get("weight_map", {})
    shards = set(index.values()) if isinstance(index, Mapping) else {index}
    for shard in [*shards, _read(source, CONFIGS[0], hub).get(WEIGHTS)]:
        refuse_elsewhere(shard, source)
    if _read(source, ADAPTER, hub):
        raise Untrusted(
            f"{source}: found {ADAPTER}, expected the weights of a whole model; merge the adapter"
            " into its model, and save that"
        )


def refuse_code(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that names code at any depth.

    Raises:
        Untrusted: it does; `where` is its file.
    """
    for place, found in _code(config):
        raise Untrusted(
            f"{where}: found {place}: {_short(found)}, which names code, expected none: code that"
            " comes with a model is never run; take the key out, if transformers knows this family"
            " by itself"
        )


def refuse_elsewhere(weights: Any, source: str | Path) -> None:
    """Refuse the name of a file of weights, if there is one, that is no safetensors in place.

    Raises:
        Untrusted: it leads elsewhere, or to a pickle.
    """
    if weights is None:
        return
    plain = isinstance(weights, str) and PurePosixPath(weights).name == weights
    if not (plain and "\\" not in weights and weights.endswith(".safetensors")):
        raise Untrusted(
            f"{source}: found weights in {_short(weights)}, expected a file *.safetensors of the"
            " same folder"
        )


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are pickles alone.

    Raises:
        Untrusted: there are some, and no safetensors.
    """
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise Untrusted(
            f"{folder}: found weights in {pickles[0]} alone, a pickle, which can run code and is"
            " never opened; expected *.safetensors; where you trust the file, save the model again"
        )


def _read(source: str | Path, name: str, hub: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a JSON file of the folder or hub id; of one that is not there, nothing."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / hub.get("subfolder", "") / name
        found = str(path) if path.is_file() else None
    else:
        try:
            found = cached_file(str(source), name, **hub)
        except (OSError, ValueError):  # who needs the file says that it is not there
            found = None
    if found is None:
        return {}
    try:
        content = json.loads(Path(found).read_text(encoding="utf-8"))
    except RecursionError:
        raise Untrusted(f"{source}/{name}: found lists or mappings nested too deep") from None
    except ValueError as error:
        raise Untrusted(f"{source}/{name}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Untrusted(f"{source}/{name}: found {type(content).__name__}, expected a mapping")
    return content


def _code(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of every key that names code."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, held in inner:
        place = f"{where}.{key}" if where else str(key)
        named = isinstance(key, str) and KERNELS.search(key) is not None
        if (key in CODE and held) or (named and any("/" in text for text in _texts(held))):
            yield place, held
        elif isinstance(held, Mapping | list):
            yield from _code(held, place)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(held)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."  # noqa: PLR2004
