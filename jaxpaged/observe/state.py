"""The state of a scheduler as bytes, so that a replay can begin in the middle of a long run.

Knows pickle, and which names may come out of one: classes of `jaxpaged.host`, its policies and plain containers. A file cannot
make it call anything else, whoever wrote it.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

_PLAIN = {
    "builtins": {"set", "frozenset", "int"},
    "collections": {"deque", "OrderedDict", "Counter", "defaultdict"},
    "array": {"array", "_array_reconstructor"},
    "functools": {"partial"},
}
_HOST = "jaxpaged.host."


def dump(state: Any) -> bytes:
    """Whatever the host side is made of; new fields of its classes come along by themselves."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    pickler.dispatch_table = {**copyreg.dispatch_table, types.MethodType: _reduce_method}
    pickler.dump(state)
    return file.getvalue()


def load(saved: bytes, policy: Callable[..., Any] | None = None) -> Any:
    """Inverse of `dump`. Raises pickle.UnpicklingError for what is not the host's, and whatever damaged bytes lead to.

    Args:
      policy: a function that may be in there beside the host's own.
    """
    unpickler = _Unpickler(io.BytesIO(saved))
    unpickler.policy = policy
    return unpickler.load()


def _reduce_method(method: types.MethodType) -> tuple[Any, ...]:
    # pickle by itself would write the call getattr(owner, name), which `_Unpickler` must not allow in general.
    return _method, (method.__self__, method.__name__)


def _method(owner: Any, name: str) -> types.MethodType:
    function = vars(type(owner)).get(name) if type(owner).__module__.startswith(_HOST) else None
    if not isinstance(function, types.FunctionType):
        raise pickle.UnpicklingError(f"{name} is no part of a scheduler's state")
    return types.MethodType(function, owner)


class _Unpickler(pickle.Unpickler):
    policy: Callable[..., Any] | None = None

    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN.get(module, ()) or (module, name) == (__name__, "_method"):
            return super().find_class(module, name)
        policy = self.policy
        if policy is not None and (module, name) == (policy.__module__, getattr(policy, "__qualname__", None)):
            return policy
        # No dots: they reach into what a module has imported. Its own classes only, for the same reason.
        if module.startswith(_HOST) and "." not in name:
            found = super().find_class(module, name)
            is_policy = module == f"{_HOST}policies" and callable(found)
            if (isinstance(found, type) or is_policy) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a scheduler's state")
