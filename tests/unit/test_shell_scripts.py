"""Scripts are read as bash reads them: what it would start, and with which arguments."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm3cli.config.scripts.shell import read_script
from glm3cli.errors import DataError

BASH = shutil.which("bash")
# Every program writes its arguments, with a byte of 0 behind each, and one of 1 behind the last.
PROGRAM = 'torchrun() { printf "%s\\0" "$@" >> "$OUT"; printf "\\1\\0" >> "$OUT"; }\n'

CONSTRUCTS = {
    "a long string, split at spaces and line breaks": r"""
        TP=2
        ARGS="
            --tensor-model-parallel-size ${TP} \
            --lr 1e-6 \
        "
        torchrun $ARGS train.py    $ARGS --save run
    """,
    "comments, also behind a line that goes on": """
        A=1 # the first
        torchrun --a $A \\
            --b \\
            # --c 3
        torchrun a#b '#c' "#d" #e
    """,
    "quotes": r"""
        A='one  two' B="three  \"four\" \$A \n"
        torchrun $A "$A" '$A' "$B" a\ b "a"'b'c "" '' $EMPTY "$EMPTY" x"y z"w \
            $'tab\there' "back\\slash" end\
less
    """,
    "arrays": """
        ARGS=(--a 1 "--b c" # a comment
              --d)
        ARGS+=(--e "$1")
        torchrun "${ARGS[@]}" ${ARGS[@]} "${ARGS[*]}" "${#ARGS[@]}" "${ARGS[1]}" ${ARGS[0]} $ARGS
        ARGS[1]=two
        torchrun "${ARGS[@]}" "${!ARGS[@]}"
    """,
    "arguments": """
        torchrun "$@" -- $@ -- "$*" -- $1 "$2" ${3:-none} $# "${@}"
        shift
        torchrun "$1" $#
        set -- p q
        torchrun "$@"
    """,
    "default values and parts": r"""
        P=/a/b/model.tar.gz
        torchrun ${UNSET:-x y} "${UNSET:-x y}" ${P:+set} "${UNSET:+set}" ${UNSET-} ${NEW:=made} $NEW
        torchrun ${P##*/} ${P%/*} ${P%%.*} ${P#/a} ${P/b/c} ${P//\//_} ${#P} ${P:3:5} ${P:3}
    """,
    "arithmetic": """
        N=8 M=3
        W=$(($N*$M)) V=$((N * M + 2)) U=$(( (N-1) / 2 % 4 ))
        torchrun $W $V $U $((-N)) "a$((1+1))b" $((UNSET+1))
    """,
    "paths": """
        HERE=$(dirname a/b/run.sh)
        THERE="$(dirname "$(dirname "a/b c/${HERE}x/d")")"
        torchrun "$THERE" $HERE $(basename /a/b/) "`dirname a/b`" $(dirname "$HERE/x")
    """,
    "pipes, lists and redirections": """
        torchrun a | tee log 2>&1
        torchrun b && torchrun c > log 2> err; torchrun d >> log < /dev/null &
        wait
        torchrun e &> log 3>&1 || torchrun never
        torchrun 1>log f 2x
    """,
    "here-documents": """
        cat <<EOF > /dev/null
        torchrun "not this
EOF
        torchrun after <<< "word"
    """,
    "functions": """
        start() {
            local extra=$2
            torchrun "$1" $extra
        }
        function other { torchrun other "$@"; }
        start one "two three"
        other four
        torchrun "$1"
    """,
    "conditions and loops, of which one way is followed": """
        if [ -n "yes" ]; then A=1; else A=2; fi
        for x in first; do torchrun "$x" $A; done
        if [[ 1 == 1 && 2 == 2 ]]; then torchrun both; fi
    """,
    "assignments in front of a command": """
        export A=1 B="2 3"
        C=4 D=5 torchrun $A "$B"
        A+=0; declare -x E=$A; readonly F=6
        torchrun $A $E $F
    """,
    "a variable in a name": """
        LOG=x; torchrun ${LOG}_1.log $LOG-2 "$LOG"3 a$LOG$LOG logs/run_${LOG}.log
        torchrun $ "$" a$ $%
    """,
    "a subshell": """
        (cd /tmp; torchrun inside)
        { torchrun group; }
    """,
}
ARGUMENTS = ["one", "two words", "3"]


def by_bash(script: Path, arguments: list[str]) -> list[tuple[str, ...]]:
    """The arguments with which bash calls `torchrun`."""
    out = script.with_suffix(".out")
    out.write_bytes(b"")
    stubs = script.with_suffix(".stubs")
    stubs.write_text(PROGRAM)
    environment = {"OUT": str(out), "BASH_ENV": str(stubs), "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [str(BASH), str(script), *arguments], env=environment, cwd=script.parent,
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    calls: list[list[str]] = [[]]
    for part in out.read_text("utf-8").split("\0")[:-1]:
        if part == "\1":
            calls.append([])
        else:
            calls[-1].append(part)
    return [tuple(call) for call in calls[:-1]]


def by_us(script: Path, arguments: list[str], **variables: str) -> list[tuple[str, ...]]:
    found = read_script(script, arguments, variables).invocations
    return [call.words[1:] for call in found if call.words[0] == "torchrun"]


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@pytest.mark.parametrize("text", CONSTRUCTS.values(), ids=CONSTRUCTS)
def test_every_construct_is_read_as_bash_reads_it(tmp_path, text):
    script = tmp_path / "run.sh"
    script.write_text(text, "utf-8")
    expected = by_bash(script, ARGUMENTS)
    assert expected
    assert by_us(script, ARGUMENTS) == expected


PIECES = ["a", "$A", '"$A"', '"${A}b"', "'$A'", "${B[@]}", '"${B[@]}"', "\\ ", '"c d"', "$((2*3))",
          "${C:-e f}", '""', "é", "--x=1"]  # fmt: skip


@pytest.mark.skipif(BASH is None, reason="there is no bash")
@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join),
        min_size=20,
        max_size=40,
    )
)
def test_words_of_any_pieces_are_split_as_bash_splits_them(tmp_path_factory, words):
    script = tmp_path_factory.mktemp("pieces") / "run.sh"
    calls = "".join(f"torchrun {word} end\n" for word in words)
    script.write_text(f"A=' x  y '\nB=(p 'q r' '')\n{calls}", "utf-8")
    assert by_us(script, []) == by_bash(script, [])


def test_other_files_are_followed_and_nothing_is_executed(tmp_path):
    (tmp_path / "env.sh").write_text("TP=4\n")
    script = tmp_path / "run.sh"
    script.write_text(
        f"source ./env.sh\nsource /usr/local/Ascend/set_env.sh\n. missing.sh\n"
        f"touch {tmp_path}/touched\nHOST=$(touch {tmp_path}/touched2)\n"
        'torchrun $TP "$HOST" $NOTHING\n'
        "if [ $RANK = 0 ]; then torchrun zero; else torchrun other; fi\n"
        'case $1 in a) torchrun a;; b) torchrun b;; esac\nfor i in 1 2; do torchrun "$i"; done\n'
    )
    found = read_script(script)
    assert [call.words for call in found.invocations if call.words[0] == "torchrun"] == [
        ("torchrun", "4", f"$(touch {tmp_path}/touched2)"),
        ("torchrun", "zero"),
        ("torchrun", "a"),
        ("torchrun", "1"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["env.sh", "run.sh"]
    notes = "\n".join(found.notes)
    for part in ("missing.sh", "line 7: a condition", "line 9: of a loop", "NOTHING", "touched2)"):
        assert part in notes
    assert by_us(script, [], TP="8", NOTHING="n")[0] == ("8", f"$(touch {tmp_path}/touched2)", "n")


def test_a_text_that_is_no_bash_is_a_sentence(tmp_path):
    script = tmp_path / "run.sh"
    for text in ("torchrun 'open", 'A="open', "torchrun $(open", "torchrun ${open", "A=(open"):
        script.write_text(text)
        with pytest.raises(DataError, match=r"is no bash script: line 1: . isn't closed"):
            read_script(script)
    with pytest.raises(DataError, match="can't read"):
        read_script(tmp_path / "missing.sh")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab $\"'`(){}\\\n;|&<>#=[]@*-1", max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    script = tmp_path_factory.getbasetemp() / "any.sh"
    script.write_text(text, "utf-8")
    with contextlib.suppress(DataError):
        read_script(script, ["x"])
