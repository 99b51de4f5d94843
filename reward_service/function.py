"""Loading and calling a reward function of the user, given as ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.trajectory import Trajectory

ARGUMENTS = ("prompt", "response", "response_ids", "meta")


class RewardFunction:
    """A loaded function that is known to take the arguments it will be called with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @classmethod
    def load(cls, path: str) -> RewardFunction:
        """Import it; the current directory counts as importable.

        Raises:
            ValueError: Not ``package.module:function``, no such module or function, or one that
                does not take the four keyword arguments.
        """
        module_name, separator, name = path.partition(":")
        if not separator or not module_name or not name:
            raise ValueError(f"reward function {path!r} must be written package.module:function")
        module = _import(module_name, path)
        function = getattr(module, name, None)
        if function is None:
            near = difflib.get_close_matches(name, [n for n in vars(module) if n[0] != "_"], 1)
            hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
            raise ValueError(f"reward function {path!r}: {module_name} has no {name!r}{hint}")
        if not callable(function):
            raise ValueError(
                f"reward function {path!r} is a {type(function).__name__}, not a function"
            )
        _check_signature(function, path)
        return cls(function)

    def __call__(self, trajectory: Trajectory) -> Any:
        """What it says of a sample."""
        return self.of_text(
            trajectory.prompt.text,
            trajectory.response_text,
            trajectory.prompt.meta,
            response_ids=trajectory.response_ids.tolist(),
        )

    def of_text(
        self,
        prompt: str,
        response: str,
        meta: Mapping[str, Any],
        *,
        response_ids: Sequence[int] = (),
    ) -> Any:
        """What it says of a text; judges know no token ids."""
        return self._function(
            prompt=prompt, response=response, response_ids=list(response_ids), meta=dict(meta)
        )


def _import(module_name: str, path: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        wanted = error.name or module_name
        if module_name != wanted and not module_name.startswith(wanted + "."):
            raise ValueError(
                f"reward function {path!r}: {module_name} itself needs the module {wanted!r}, "
                "which is not installed"
            ) from error
        parent, _, last = module_name.rpartition(".")
        folder = Path(*parent.split(".")) if parent else Path()
        names = [p.stem for p in folder.glob("*.py")]
        near = difflib.get_close_matches(last, names, 1)
        if near:
            guess = ".".join(filter(None, [parent, near[0]]))
            hint = f"; did you mean {guess}:{path.partition(':')[2]}?"
        else:
            hint = f": install it, or put {last}.py into {here}"
        raise ValueError(
            f"reward function {path!r}: there is no module {module_name!r}{hint}"
        ) from None
    except Exception as error:  # the module's own code may raise anything
        raise ValueError(
            f"reward function {path!r}: importing {module_name} raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_signature(function: Callable[..., Any], path: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins do not tell
        return
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise ValueError(
            f"reward function {path!r} is called with the keyword arguments "
            f"{', '.join(ARGUMENTS)}, but its signature is {signature} ({error}); "
            "name those that it uses and end with **_"
        ) from None
