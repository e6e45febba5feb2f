"""Completion of the command line in bash and zsh: commands, names of recipes, names of methods."""

from collections.abc import Sequence

from lightning_sparse.compare.plan import methods
from lightning_sparse.zoo import recipes

__all__ = ["SHELLS", "script"]

#: what a shell needs before a script for bash
SHELLS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}

_SCRIPT = """_lightning_sparse() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} names="" done=""
  if [ "$word" = "=" ]; then
    word=""
  elif [ "$before" = "=" ]; then
    before=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  case "$before" in
    --recipe|recipes) names="{recipes}" ;;
    --methods) names="{methods}"; case "$word" in *,*) done="${{word%,*}}," ;; esac ;;
    lightning-sparse) names="{commands}" ;;
  esac
  COMPREPLY=($(compgen -P "$done" -W "$names" -- "${{word#"$done"}}"))
}}
complete -o default -F _lightning_sparse lightning-sparse
"""


def script(shell: str, commands: Sequence[str]) -> str:
    """Return the script that a shell reads to complete names.

    Args:
        shell: a key of ``SHELLS``.
        commands: of ``lightning-sparse``.

    Raises:
        ValueError: there is none for this shell.

    >>> "dfbst-lenet300-mnist" in script("bash", ["fit"]), script("zsh", ["fit"]).startswith("autoload")
    (True, True)
    """
    if shell not in SHELLS:
        raise ValueError(f"--completion must be one of {', '.join(SHELLS)}, got {shell!r}.")
    names = ["dense", *(name.lower() for name in methods())]
    return SHELLS[shell] + _SCRIPT.format(
        recipes=" ".join(recipes.names()), methods=" ".join(names), commands=" ".join(commands)
    )
