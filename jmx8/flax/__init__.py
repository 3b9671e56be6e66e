"""MXFP8 weights in Flax: Linen and NNX models run on them unchanged.

`quantize_params` takes Linen variables, an `nnx.State` or an `nnx.Module` and puts an
`MXArray` in the place of each kernel. The layers that multiply by one, `nn.Dense`,
`nn.DenseGeneral` and `nn.Einsum` of Linen, `nnx.Linear`, `nnx.LinearGeneral` and
`nnx.Einsum`, and all that is made of them, such as attention, then call `mx_matmul`.

How: importing this package, which `quantize_params` does if Flax is loaded, replaces
`__call__` of these six classes by one that looks at the kernel. If it is an ordinary
array, Flax's own runs, as before. If it is an `MXArray`, Flax's own runs too, dtype
promotion, axes and bias included, on a stand-in for the layer that hands it a view of
the kernel and, as its `dot_general`, `jmx8.ops.folded.dot_general`.

Why so, and not otherwise:

- The places that Flax provides for a `dot_general` or `einsum` of one's own are too
  late: Linen compares the parameter's shape with that of its initializer, and both
  turn the kernel into a `jax.Array` before, which an `MXArray` must not become. They
  are used, after that. And they are set where the model is written.
- `nn.intercept_methods` is a context around the call of the model, of one thread, and
  NNX has no such thing.
- `jmx8.quantized` around the call traces a whole model for the sake of a few layers.
  It is there for models that multiply by parameters themselves.
- JAX has no protocol by which an operand chooses what `lax.dot_general` does.

The products are W8A16, as those of `x @ w`: activations are not quantized.

What the parameters of a Linen model do not tell, `contract_of` finds in the model:
which axes of a kernel with more than two are contracted.

A class that was made of a layer by `nn.remat`, `nn.vmap` or `nn.scan` keeps the
`__call__` of that time: import this package before.
"""

from .._kernel_axes import KernelAxes as KernelAxes, MXKernel as MXKernel
from . import _linen, _nnx
from ._contract import contract_of as contract_of
from ._tree import unpack as unpack


_linen.install()
_nnx.install()
