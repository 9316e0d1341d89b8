"""The operator.

Reading order: `reference.py` (the specification); `api.py` (the public door) with `validate.py`, `call.py` (what a call
hands on), `packed.py` (packed documents) and `cache_view.py`; `routing.py` (which backend, and why), `stages.py` (one
operator, or stage by stage), `registry.py` (torch.library, and what a backend must have); `paged.py` (a step from a
paged cache); the backends `torch_native/` and `triton/`.
"""
