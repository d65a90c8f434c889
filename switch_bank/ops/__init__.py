from importlib.util import find_spec

TRITON_INSTALLED = find_spec("triton") is not None
