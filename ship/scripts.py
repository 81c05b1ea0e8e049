"""run.sh and run.ps1: one question answered, or a server started, with whatever of Ollama, llama.cpp and r1q a machine has."""

from __future__ import annotations

from dataclasses import dataclass

_SH = r"""#!/bin/sh
# Ask the model one question, or start a server:
#   ./run.sh "What is 17 + 25?"
#   ./run.sh --serve [options of the server]
# Uses the first of Ollama, llama.cpp and r1q that is installed; R1Q_RUN=ollama|llama|r1q chooses.
# The files are checked against SHA256SUMS first; R1Q_SKIP_CHECK=1 leaves that out.
set -eu
cd "$(dirname "$0")"

if [ -z "${R1Q_SKIP_CHECK:-}" ]; then
  if command -v sha256sum >/dev/null; then
    sha256sum -c SHA256SUMS >/dev/null || { echo "this parcel is damaged: see above" >&2; exit 6; }
  elif command -v shasum >/dev/null; then
    shasum -a 256 -c SHA256SUMS >/dev/null || { echo "this parcel is damaged: see above" >&2; exit 6; }
  else
    echo "neither sha256sum nor shasum is here: the files are not checked" >&2
  fi
fi

has() { command -v "$1" >/dev/null 2>&1; }
tool=${R1Q_RUN:-}
if [ -z "$tool" ]; then
  if has ollama && [ -f Modelfile ]; then tool=ollama
  elif [ -f "@FILE@" ] && has llama-cli && has llama-server; then tool=llama
  elif has r1q; then tool=r1q
  else
    echo "none of ollama, llama.cpp (llama-cli, llama-server) and r1q is installed; get one of them:" >&2
    echo "  https://ollama.com   https://github.com/ggml-org/llama.cpp   pip install 'r1q[llama-cpp,serve]'" >&2
    exit 4
  fi
fi
[ $# -gt 0 ] || { echo "usage: $0 \"a question\" | --serve" >&2; exit 2; }

case "$tool" in
  ollama)
    ollama create "@NAME@" -f Modelfile >&2
    if [ "$1" = --serve ]; then echo "served by Ollama as @NAME@: http://127.0.0.1:11434/v1"; exit 0; fi
    exec ollama run "@NAME@" "$1" ;;
  llama)
    if [ "$1" = --serve ]; then
      shift
      exec llama-server -m "@FILE@" --jinja -c @CONTEXT@ --temp @TEMPERATURE@ --top-p @TOP_P@ --host 127.0.0.1 "$@"
    fi
    exec llama-cli -m "@FILE@" --jinja -c @CONTEXT@ --temp @TEMPERATURE@ --top-p @TOP_P@ -st -p "$1" ;;
  r1q)
    if [ "$1" = --serve ]; then
      shift
      exec r1q serve "@FILE@" --context @CONTEXT@ "$@"
    fi
    exec r1q serve "@FILE@" --context @CONTEXT@ --ask "$1" ;;
  *)
    echo "R1Q_RUN is '$tool': it is one of ollama, llama, r1q" >&2; exit 2 ;;
esac
"""

_PS1 = r"""# Ask the model one question, or start a server:
#   ./run.ps1 "What is 17 + 25?"
#   ./run.ps1 -Serve
param([string]$Question, [switch]$Serve, [switch]$SkipCheck)
$ErrorActionPreference = 'Stop'
Set-Location $PSScriptRoot

if (-not $SkipCheck) {
  foreach ($line in [IO.File]::ReadAllLines("$PSScriptRoot/SHA256SUMS")) {
    $sum, $name = $line -split '  ', 2
    if ((Get-FileHash -Algorithm SHA256 -LiteralPath $name).Hash -ne $sum) {
      [Console]::Error.WriteLine("this parcel is damaged: $name"); exit 6
    }
  }
}
if (-not $Serve -and -not $Question) { [Console]::Error.WriteLine('usage: run.ps1 "a question" | -Serve'); exit 2 }

function Has($tool) { [bool](Get-Command $tool -ErrorAction SilentlyContinue) }
if ((Has ollama) -and (Test-Path Modelfile)) {
  ollama create '@NAME@' -f Modelfile
  if ($Serve) { 'served by Ollama as @NAME@: http://127.0.0.1:11434/v1' } else { ollama run '@NAME@' $Question }
} elseif ((Test-Path -PathType Leaf '@FILE@') -and (Has llama-cli) -and (Has llama-server)) {
  $options = '-m', '@FILE@', '--jinja', '-c', '@CONTEXT@', '--temp', '@TEMPERATURE@', '--top-p', '@TOP_P@'
  if ($Serve) { llama-server @options --host 127.0.0.1 } else { llama-cli @options -st -p $Question }
} elseif (Has r1q) {
  if ($Serve) { r1q serve '@FILE@' --context @CONTEXT@ } else { r1q serve '@FILE@' --context @CONTEXT@ --ask $Question }
} else {
  [Console]::Error.WriteLine("install one of ollama, llama.cpp and r1q (pip install 'r1q[llama-cpp,serve]')"); exit 4
}
exit $LASTEXITCODE
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the scripts run: the model's `name` for Ollama, the `file` (or folder, for r1q alone) beside them, and R1's settings."""

    name: str
    file: str
    context: int
    temperature: float
    top_p: float


def run_scripts(run: Run) -> dict[str, str]:
    """Return the text of run.sh and run.ps1. Names have been checked: they hold nothing that a shell reads."""
    values = {
        "@NAME@": run.name,
        "@FILE@": run.file,
        "@CONTEXT@": str(run.context),
        "@TEMPERATURE@": f"{run.temperature:g}",
        "@TOP_P@": f"{run.top_p:g}",
    }
    texts = {"run.sh": _SH, "run.ps1": _PS1}
    for mark, value in values.items():
        texts = {name: text.replace(mark, value) for name, text in texts.items()}
    return texts
