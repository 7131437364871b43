"""Why an attention was left as it was: one enum, each member a sentence for the reader of the report."""

import enum


class Reason(enum.Enum):
    """A reason for not fusing. ``name`` is stable and meant for tests and scripts, ``value`` for people."""

    NO_PRODUCT = "the softmax input is not a product of a query and a key"
    NO_VALUE_PRODUCT = "the softmax result is not multiplied with a value tensor"
    SOFTMAX_DIM = "the softmax does not run over the keys"
    WEIGHTS_USED = "the attention weights are used elsewhere, so they have to exist"
    SCORES_USED = "the attention scores are used elsewhere, so they have to exist"
    SCORE_OP = "an operation on the scores is not one that the kernels can carry out"
    WEIGHTS_OP = "an operation on the attention weights is not one that the kernels can carry out"
    TENSOR_SCALE = "the scale is a tensor of a kind that cannot be taken to the queries"
    FILL_VALUE = "the value written over masked scores is not low enough to be a mask"
    EMPTY_ROWS = "a query may have every key masked, and what the user's code gives there cannot be kept"
    LAYOUT = "the operands do not line up as query, key and value of one attention"
    DTYPE = "the dtype is not one that a fused attention computes without loss"
    MUTATED = "a tensor that the attention reads is written to in place before the attention runs"
    OPAQUE = "the attention is inside an operation that cannot be taken apart"
    GRAD_MODE = "part of the attention is computed without gradients (no_grad) and part with them"
    USER_BACKEND = "the user's code chose the attention backend itself (sdpa_kernel)"
    DEVICE = "the tensors are not all on one device"
    NESTED = "nested tensors are not handled"
    EMPTY = "a dimension is zero"
    CAPTURE = "the graph could not be captured"
    INTERNAL = "the pass failed on this attention (a bug in fa3_inductor)"

    @property
    def sentence(self) -> str:
        return self.value
