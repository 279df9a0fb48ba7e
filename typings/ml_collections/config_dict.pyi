from typing import Any

from ml_collections import ConfigDict as ConfigDict
from ml_collections import FrozenConfigDict as FrozenConfigDict

def __getattr__(name: str) -> Any: ...
