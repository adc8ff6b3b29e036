"""TensorFlow and seqio as this package wants them: quiet, and on the CPU alone.

Importing this module takes seconds, so nothing imports it before text is asked for. Everything
that needs `tf` or `seqio` takes them from here, since the settings must precede the import.
"""

import logging
import os

from aquila_jax.errors import UserError

__all__ = ["seqio", "tf"]

# 2: errors only. Set before the import, and left alone where a person chose a level.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Nothing is computed with TensorFlow but batches, and its oneDNN kernels announce themselves.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

try:
    import tensorflow as tf
except ImportError as error:
    raise UserError(
        f"reading text needs TensorFlow and seqio ({error}): pip install 'aquila-jax[data]'"
    ) from error

for _kind in ("GPU", "TPU"):
    try:
        # The accelerators belong to JAX; TensorFlow would claim their memory.
        tf.config.set_visible_devices([], _kind)
    except RuntimeError:
        # TensorFlow was already in use in this process: too late, and its user's choice.
        logging.getLogger(__name__).debug("TensorFlow already holds its %s devices", _kind)

try:
    import seqio
except ImportError as error:
    raise UserError(
        f"reading text needs seqio ({error}): pip install 'aquila-jax[data]'"
    ) from error
