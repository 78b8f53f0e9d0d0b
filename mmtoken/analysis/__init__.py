"""What a model costs: multiply-accumulates, time and memory, beside its dense twin."""

from .cost import Cost, measure_cost
from .macs import count_macs
from .twin import dense_twin

__all__ = ['Cost', 'count_macs', 'dense_twin', 'measure_cost']
