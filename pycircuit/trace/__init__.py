"""Attribution graphs: from a model and a prompt to the direct effects between its features.

`attribute.py` runs these steps in this order; the files named do the work.

 1. Check that a trace of this length can fit the memory bound.                           estimate.py, memory_plan.py
 2. Run the model once. Freeze its attention patterns and the denominators of its norms, and replace each MLP by its
    active features and an error: what is left is linear in features, errors and tokens.  model/replacement.py
 3. Choose the targets: the likeliest next tokens, or what the caller names.  targets.py, contrast.py
 4. Give each source a column of the edge rows.                                           columns.py
 5. Plan the memory: rows dense, packed or cut to their largest entries; tile size.    memory_plan.py, memory_model.py
    Unless the caller names a number, decide how many features get a row.                 default_features.py
 6. Sweep backward from a tile of targets. At every layer, a source's edge is its vector times the gradient there.
                                                                                          sweep.py, precision.py
 7. Where a target meets its first attention, keep its gradient as a few vectors.         first_attention.py
 8. Check the rows and store them, on disk too with a checkpoint.             finite.py, row_store.py, checkpoint.py,
                                                          and on a GPU device_store.py, device_rows.py, device_export.py
 9. Rank the features without a row by their influence on the targets, sweep from the best of them as in 6 to 8, and
    repeat until max_features have a row.                                                 collect.py
10. Pack all rows and build the `Graph`.                                                  graph_of_rows.py
11. Label the features without a name by the tokens they raise and are active on.         labels/automatic.py
"""

from .attribute import attribute, trace_frozen
from .checkpoint import CheckpointError
from .contrast import Contrast
from .estimate import Estimate, estimate
from .many import attribute_many
from .memory_plan import MemoryBoundError
from .precision import Precision
from .targets import Feature, TargetLike, TargetList

__all__ = [
    "CheckpointError",
    "Contrast",
    "Estimate",
    "Feature",
    "MemoryBoundError",
    "Precision",
    "TargetLike",
    "TargetList",
    "attribute",
    "attribute_many",
    "estimate",
    "trace_frozen",
]
