"""From text to a function that can be called: compiled once, kept on disk, safe under many processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any


def _imported(name: str) -> tuple[Any, str]:
    """A module that may not be there, or not load; or why it cannot be had."""
    try:
        return import_module(name), ""
    except (ImportError, OSError) as error:
        return None, f"anything here, as {name} cannot be imported ({error})"


llvm, MISSING = _imported("llvmlite.binding")

VECTORISED = 2000
"""Below so many instructions LLVM looks for scalars to put into vectors; it takes too long for more."""


def folder() -> Path:
    """Where compiled programs are kept; ``ADJOINT_CACHE`` says another place."""
    chosen = os.environ.get("ADJOINT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "adjoint-revolve"


@lru_cache(maxsize=1)
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


@lru_cache(maxsize=1)
def _host() -> tuple[str, str]:
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _machine() -> Any:
    cpu, features = _host()
    return _target().create_target_machine(cpu=cpu, features=features, opt=2, codemodel="jitdefault", jit=True)


def vector_bits() -> int:
    """How wide the machine's vectors are."""
    features = _host()[1].split(",")
    return 512 if "+avx512f" in features else 256 if "+avx" in features else 128


class Compiled:
    """A compiled module; as long as it lives its function can be called."""

    def __init__(self, text: str) -> None:
        self.from_disk = True
        self._machine = _machine()
        key = "\n".join((text, sys.modules["llvmlite"].__version__, str(llvm.llvm_version_info), *_host()))
        name = f"{hashlib.sha256(key.encode()).hexdigest()}.o"
        data = _kept(name)
        if data is None:
            self.from_disk = False
            data = _object(text, self._machine)
            _keep(name, data)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._machine)
        self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(data))
        self._engine.finalize_object()
        self.sweep = self._function("sweep")
        self.explore = self._function("explore") if "@explore(" in text else None

    def _function(self, name: str) -> Callable[[int], None]:
        address = self._engine.get_function_address(name)
        assert address, f"the compiled module has no {name}"
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _object(text: str, machine: Any) -> bytes:
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.slp_vectorization = text.count("\n") < VECTORISED
    options.loop_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _kept(name: str) -> bytes | None:
    try:
        data = (folder() / name).read_bytes()
    except OSError:
        return None
    digest, rest = data[:32], data[32:]
    return rest if hashlib.sha256(rest).digest() == digest else None


def _keep(name: str, data: bytes) -> None:
    """Written aside and moved into place, so that no other process ever sees half of it. A full disk is no error."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder(), delete=False) as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(file.name, folder() / name)
    except OSError:
        return
