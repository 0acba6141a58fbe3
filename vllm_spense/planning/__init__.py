"""What Spense should gain when served, from shapes and GPU data alone: before anyone prunes. Needs no GPU."""

from vllm_spense.devices import GPUS, Gpu
from vllm_spense.planning.compare import Comparison, compare
from vllm_spense.planning.gain import Prediction, plan
from vllm_spense.planning.shapes import ModelShape, read_model

__all__ = ["GPUS", "Comparison", "Gpu", "ModelShape", "Prediction", "compare", "plan", "read_model"]
