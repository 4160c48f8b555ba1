"""ALTO and LAMB, exact under DeepSpeed's ZeRO.

Importing this package makes the optimizer types "ALTO" and "E" known to DeepSpeed's JSON.
"""

from alto_ds.adaptor import E, from_config
from alto_ds.client_optimizer import warn_where_one_is_used
from alto_ds.optimizer import ALTO
from alto_ds.registration import register
from alto_ds.trust_ratio import TrustRatio

__all__ = ["ALTO", "E", "TrustRatio"]

register("ALTO", ALTO)
register("E", from_config)
warn_where_one_is_used()
