"""Front door: `python -m rmt_lightning.lm_eval --model_args pretrained=<folder> --tasks …` is `lm_eval` for our models.

The lm-evaluation-harness finds models of other packages only once they have been made known to it. So this door does
that, and hands all words on; from Python, importing rmt_lightning.analysis.harness does it.
"""

from __future__ import annotations

import sys

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.quoting import one_line

NAME = "rmt_lightning"


def run() -> None:
    """Hand the words of the command line on to the harness, and name our models if none are named."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
        from lm_eval.models import MODEL_MAPPING
    except ImportError as error:
        told = "is not installed" if error.name == "lm_eval" else f"cannot be imported ({one_line(str(error))})"
        sys.exit(f"error: lm_eval: {told}; pip install --upgrade 'rmt-lightning[lm-eval]'")
    assert NAME not in MODEL_MAPPING
    if NAME not in model_registry:
        # It is imported when it is asked for, as those of the harness are.
        model_registry.register(NAME, target="rmt_lightning.analysis.harness:RecurrentLM")
    if not any(word.split("=")[0] in ("--model", "-M", "-h", "--help") for word in sys.argv):
        sys.argv += ["--model", NAME]
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
