"""kvfold: make the KV cache of a pretrained decoder smaller, and tell the truth about bytes.

Importing it teaches transformers' Auto classes to load folded models; nothing is patched.
"""

from kvfold.runtime.modeling import register as _register

_register()
