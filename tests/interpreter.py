"""Speeds up Triton's interpreter."""

from __future__ import annotations


def hasten() -> None:
    """Triton's interpreter searches its whole language for what to patch in every call of a device
    function, which takes as long as the arithmetic of a small tile. Within a launch the second
    search finds everything patched, so it is left out."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version of Triton
    search, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_lang(fn):
        seen = {m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core}
        if seen <= patched:
            return interpreter._LangPatchScope()
        scope = search(fn)
        patched.update(seen)
        return scope

    def call(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
    # Half of its time goes into whether integers overflow, which nobody asks: debug is off.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
