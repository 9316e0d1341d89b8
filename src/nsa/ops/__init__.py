"""The operator.

Reading order: `reference.py` (the specification), `api.py` (the public door) with `validate.py` and `cache_view.py`;
`paged.py` (a step from a paged cache); `routing.py` (which backend, and why), `registry.py` (torch.library); the
backends `torch_native/` and `triton/`.
"""
