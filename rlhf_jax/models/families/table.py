"""The words in which a family says how its weights are ours, both ways.

A family's table is a tuple of `Tensor`s, each a tensor of the published
checkpoint and the parameters of ours that it holds: one, or several where
projections are fused. `{}` in a name stands for the layer, and a second one for
the expert; our layers, and the experts of each, are one stacked array. Rows for
parameters that a config does not have (a bias, say) are passed over.

    linear("h.{}.attn.c_proj", "layers/attention/out", transposed=False)
"""

import dataclasses
import math
from typing import Literal

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """One tensor of the checkpoint.

  name: the first {} is the layer, the second the expert.
  paths: of our parameters, '/'-joined.
  kind: 'matrix' is a product's kernel, 'vector' a bias (heads flattened),
    'same' has our shape.
  transposed: a matrix is [out, in], as torch's Linear has it.
  interleaved: of fused projections, a head's parts stand together; else one
    part comes after the other.
  skip_rows: the file's first so many rows mean nothing to us.
  """

  name: str
  paths: tuple[str, ...]
  kind: Literal["matrix", "vector", "same"] = "same"
  transposed: bool = True
  interleaved: bool = False
  skip_rows: int = 0

  @property
  def num_indices(self) -> int:
    """How many leading axes of our parameters the name counts through."""
    return self.name.count("{}")

  def file_shape(self, shapes: tuple[Shape, ...]) -> Shape:
    """The tensor's shape in the file, from those of our parameters."""
    if self.kind == "same":
      rows, *rest = shapes[0]
      return (rows + self.skip_rows, *rest)
    if self.kind == "vector":
      return (sum(math.prod(shape) for shape in shapes),)
    size_in = math.prod(shapes[0][: self._num_in])
    size_out = sum(math.prod(shape) for shape in shapes) // size_in
    return (size_out, size_in) if self.transposed else (size_in, size_out)

  def to_ours(
      self, x: np.ndarray, shapes: tuple[Shape, ...]
  ) -> tuple[np.ndarray, ...]:
    """Our parameters (of one layer and expert), mostly views of `x`."""
    if self.kind == "same":
      return (x[self.skip_rows :],)
    if self.kind == "vector":
      x = x[None]
    elif self.transposed:
      x = x.T
    if self.interleaved:
      heads, width = shapes[0][-2:]
      parts = x.reshape(x.shape[0], heads, len(shapes), width)
      parts = [parts[:, :, i] for i in range(len(shapes))]
    else:
      sizes = [math.prod(shape) // x.shape[0] for shape in shapes]
      parts = np.split(x, np.cumsum(sizes)[:-1], axis=1)
    return tuple(
        part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)
    )

  def to_theirs(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """The inverse of `to_ours`."""
    if self.kind == "same":
      rows = np.zeros((self.skip_rows, *arrays[0].shape[1:]), arrays[0].dtype)
      return np.concatenate([rows, arrays[0]]) if self.skip_rows else arrays[0]
    size_in = 1
    if self.kind == "matrix":
      size_in = math.prod(arrays[0].shape[: self._num_in])
    if self.interleaved:
      heads, width = arrays[0].shape[-2:]
      parts = [a.reshape(size_in, heads, width) for a in arrays]
      x = np.stack(parts, axis=2).reshape(size_in, -1)
    else:
      parts = [a.reshape(size_in, -1) for a in arrays]
      x = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    if self.kind == "vector":
      return x[0]
    return x.T if self.transposed else x

  @property
  def _num_in(self) -> int:
    # The one kernel that takes heads in: [H, K, D].
    return 2 if self.paths[0].endswith("attention/out/kernel") else 1


def linear(
    name: str,
    *paths: str,
    transposed: bool = True,
    interleaved: bool = False,
) -> tuple[Tensor, ...]:
  """A projection's weight and bias; of several paths, fused ones."""
  options = dict(transposed=transposed, interleaved=interleaved)
  return (
      Tensor(
          name=f"{name}.weight",
          paths=tuple(f"{path}/kernel" for path in paths),
          kind="matrix",
          **options,
      ),
      Tensor(
          name=f"{name}.bias",
          paths=tuple(f"{path}/bias" for path in paths),
          kind="vector",
          **options,
      ),
  )


def norm(name: str, path: str) -> tuple[Tensor, ...]:
  """A norm's weight, and its bias if it has one."""
  return (
      Tensor(name=f"{name}.weight", paths=(f"{path}/scale",)),
      Tensor(name=f"{name}.bias", paths=(f"{path}/bias",)),
  )


def embedding(name: str, path: str, skip_rows: int = 0) -> tuple[Tensor, ...]:
  """A table of vectors."""
  return (
      Tensor(name=f"{name}.weight", paths=(path,), skip_rows=skip_rows),
  )
