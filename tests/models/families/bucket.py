"""gs://bucket as a local folder: etils is told to look there."""

import glob
import os
import pathlib
import types

from etils import epath


def mocked(folder: pathlib.Path):
  """A context in which gs://bucket is `folder`."""
  place = lambda path: str(path).replace("gs://bucket", str(folder))
  on_disk = lambda fn: lambda _, path, *args, **options: fn(
      place(path), *args, **options
  )
  return epath.testing.mock_epath(
      open=on_disk(open),
      exists=on_disk(os.path.exists),
      isdir=on_disk(os.path.isdir),
      listdir=on_disk(os.listdir),
      makedirs=on_disk(os.makedirs),
      mkdir=on_disk(os.mkdir),
      stat=lambda _, path: types.SimpleNamespace(
          length=os.path.getsize(place(path))
      ),
      glob=on_disk(glob.glob),
      rename=lambda _, a, b: os.rename(place(a), place(b)),
      replace=lambda _, a, b: os.replace(place(a), place(b)),
      remove=on_disk(os.remove),
  )
