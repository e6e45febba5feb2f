"""Completion of the command line, by the shell itself."""

import shutil
import subprocess

import pytest

from lightning_sparse import cli, completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["co"], ["compare"]),
        (["recipes", "dst-lenet300-m"], ["dst-lenet300-mnist"]),
        (["fit", "--recipe", "=", "dst-lenet300-m"], ["dst-lenet300-mnist"]),
        (["compare", "--methods", "dense,rig"], ["dense,rigl"]),
        (["fit", "--trainer.max_epochs"], []),
    ],
)
def test_bash_completes_commands_recipes_and_methods(words, found, capsys):
    cli.main(["--completion", "bash"])
    text = capsys.readouterr().out
    quoted = " ".join(f"'{word}'" for word in ["lightning-sparse", *words])
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _lightning_sparse; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    answer = subprocess.run(["bash", "-c", text + ask], capture_output=True, text=True, check=True).stdout
    assert answer.split() == found


def test_other_shells_are_refused_by_name():
    with pytest.raises(ValueError, match="--completion must be one of bash, zsh, got 'fish'"):
        completion.script("fish", [])
