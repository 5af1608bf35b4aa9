"""``bat``: one command for all, lists of what there is, and completion for shells.

``bat NAME`` runs ``bat/cli/NAME.py``; a file there is all that a new command needs.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
import sys
from pathlib import Path

from bat.cli import args
from bat.errors import UserError

ABOUT = "Pre-train, probe and fine-tune audio encoders. `bat NAME --help` explains a command."
EPILOG = """\
examples:
  bat recipes probe                     recipes of one command
  bat probe --settings data             every setting of a section, with type, default, meaning
  bat runs                              all runs below runs/
  eval "$(bat completion bash)"         completion in this shell; for all, add it to ~/.bashrc

bat-NAME is the same as `bat NAME` where it is installed.
"""
LISTS = {
    "recipes": "Recipes of each command, or of one: bat recipes [pretrain|finetune|probe]",
    "methods": "Probes (--method)",
    "tasks": "Data sets and layouts (task=)",
    "encoders": "Encoders (model.backbone=, and files of other projects)",
    "objectives": "Objectives of pre-training (objective.name=)",
    "completion": "Completion script: bat completion bash|zsh",
}
BASH = """\
_bat() {{
  local line=${{COMP_LINE:0:COMP_POINT}} word head IFS=$'\\n'
  word=${{line##*[[:space:]]}}
  COMPREPLY=($({python} -m bat.cli.bat --complete "$line" 2>/dev/null))
  case $word in *[=:,]*)  # bash replaces the word after its last = or : alone
    head=${{word%"${{word##*[=:]}}"}}; COMPREPLY=("${{COMPREPLY[@]#"$head"}}") ;;
  esac
  case ${{COMPREPLY[0]-}} in *=|*.) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _bat bat {commands}
"""
ZSH = """\
_bat() {{
  local -a found
  found=("${{(@f)$({python} -m bat.cli.bat --complete "$LBUFFER" 2>/dev/null)}}")
  if [[ -n $found ]]; then compadd -Q -S '' -- $found; else compset -P '*='; _files; fi
}}
compdef _bat bat {commands}
"""


def commands() -> dict[str, str]:
    """Returns the commands in ``bat/cli`` with a line each."""
    from bat.cli.describe import sentence

    found = {}
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        for node in ast.parse(_source(file)).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ABOUT":
                found[file.stem] = sentence(ast.literal_eval(node.value))
    return {name: line for name, line in found.items() if "_" not in name and name != "bat"}


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    name = given[0] if given else "--help"
    if name == "--complete":
        print("\n".join(complete(given[1])))
        return 0
    if name in commands():
        return int(importlib.import_module(f"bat.cli.{name}").main(given[1:]))
    p = args.parser("", ABOUT, EPILOG)
    p.prog, p.lists = "bat", {"commands": commands, "lists": lambda: LISTS}
    p.add_argument("name", metavar="NAME", help="a command or a list, see below")
    p.add_argument("of", metavar="WHAT", nargs="?", default="", help="of recipes and completion")
    with args.Command(p, given or ["--help"]) as call:
        print(_list(call.options.name, call.options.of))
    return call.code


def _list(name: str, of: str) -> str:
    from bat.cli import describe

    if name not in LISTS:
        names = [*commands(), *LISTS]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(names)}"
        raise UserError(f"no command is called '{name}': {hint}")
    if name == "completion":
        if of not in ("bash", "zsh"):
            raise UserError(f"completion {of or '?'}: say bat completion bash, or zsh")
        known = " ".join(f"bat-{command}" for command in commands())
        return (BASH if of == "bash" else ZSH).format(python=sys.executable, commands=known)
    if name != "recipes":
        return args.lines(describe.components("probes" if name == "methods" else name))
    if of and of not in describe.SCHEMAS:
        raise UserError(f"recipes {of}: say one of {', '.join(describe.SCHEMAS)}")
    some = [of] if of else list(describe.SCHEMAS)
    return "\n".join(f"bat-{command}:\n{args.lines(describe.recipes(command))}" for command in some)


def complete(line: str) -> list[str]:
    """Returns the words that may end the command line ``line``, whose last word is unfinished."""
    words = line.split()
    last = "" if line[-1:].isspace() else words.pop()
    command = Path(words[0]).name.removeprefix("bat-") if words else ""
    if command == "bat" and len(words) == 1:
        known = [*commands(), *LISTS]
    else:
        known = _words(words[1] if command == "bat" else command, words[-1], last)
    return [word for word in known if word.startswith(last)]


def _words(command: str, before: str, last: str) -> list[str]:
    """Returns the words that may follow ``before`` in ``command``."""
    from bat.cli import describe
    from bat.config import locate

    if last.startswith("-"):
        files = ["args"] * (command in describe.SCHEMAS) + [command] * (command in commands())
        texts = " ".join(_source(Path(__file__).with_name(f"{name}.py")) for name in files)
        return sorted({*re.findall(r'"(--[a-z-]+)"', texts), "--help", "--version", "--debug"})
    if command not in describe.SCHEMAS:
        return {"completion": ["bash", "zsh"], "recipes": list(describe.SCHEMAS)}.get(command, [])
    known = {s.key: s for s in describe.settings(command)}
    sections = dict.fromkeys(key.partition(".")[0] for key in known if "." in key)
    key, given, _ = last.partition("=")
    if before == "--method" or last.startswith("methods="):
        start = re.match(r"(methods=)?(.*,)?", last)
        return [f"{start and start[0]}{name}" for name in [*describe.components("probes"), "all"]]
    if given:
        values = {name: list(setting.values) for name, setting in known.items()}
        values |= {section: locate.known_fragments(section) for section in sections}
        values |= {"recipe": list(describe.recipes(command))}
        values |= {"task": list(describe.components("tasks"))}
        return [f"{key}={value}" for value in values.get(key, [])]
    picked = [f"{section}=" for section in sections if locate.known_fragments(section)]
    top = [f"{name}=" for name in known if "." not in name or "." in last]
    return [*top, *(f"{section}." for section in sections if "." not in last), *picked]


def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
