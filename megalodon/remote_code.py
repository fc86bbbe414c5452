"""What a saved folder holds for programs that import nothing: files that import the library.

With `trust_remote_code=True` transformers runs the files of a folder that `auto_map` names. Ours
hand on the classes of the installed library; no code of a model is copied.
"""

import os

CONFIG_FILE, TOKENIZER_FILE = "modeling_megalodon.py", "tokenization_megalodon.py"

CONFIG_AUTO_MAP = {
    "AutoConfig": "modeling_megalodon.MegalodonConfig",
    "AutoModel": "modeling_megalodon.MegalodonModel",
    "AutoModelForCausalLM": "modeling_megalodon.MegalodonForCausalLM",
}
TOKENIZER_AUTO_MAP = {"AutoTokenizer": ["tokenization_megalodon.MegalodonTokenizer", None]}

_NAMES = {
    CONFIG_FILE: "MegalodonConfig, MegalodonForCausalLM, MegalodonModel",
    TOKENIZER_FILE: "MegalodonTokenizer",
}

# Of what stands outside of `try` transformers itself says what is missing, and how to install it:
# `pip install megalodon`, which is another program.
_CONTENT = """\
try:
    from megalodon import {names}
except ImportError as error:
    raise ImportError(
        f"{{error}}: this folder needs the library megalodon of the project megalodon-enwik8: in a "
        "clone of it, pip install . (the package megalodon of PyPI is another program)"
    ) from error
"""


def write_imports(folder: str | os.PathLike[str], file: str) -> str:
    """Write one of the two files to a folder, which is made if need be. Returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, file)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(_CONTENT.format(names=_NAMES[file]))
    return path
