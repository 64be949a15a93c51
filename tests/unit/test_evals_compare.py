"""Two results of the same questions: differences against scipy's, refusals, and the page."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from glm3cli.config.evaluation import CompareConfig
from glm3cli.errors import DataError
from glm3cli.evals.compare import compare, read_result, run_compare
from tests.support.report_page import read_page


def _result(seed: int, share: float, **more: Any) -> dict[str, Any]:
    drawn = random.Random(seed)
    questions = [
        {
            "subject": f"subject {i % 4}",
            "index": i // 4,
            "scores": [],
            "choice": "A" if drawn.random() < share else "B",
            "answer": "A",
            "shots": 0,
        }
        for i in range(120)
    ]
    micro = sum(one["choice"] == "A" for one in questions) / 120
    about = {"benchmark": "mmlu", "protocol": "logits", "shots": 5, "settings": {"model": "m"}}
    return about | {"questions": questions, "micro": micro, "prompt_sha256": "ab" * 32} | more


def _write(folder: Path, **results: Any) -> list[Path]:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return [folder / f"{name}.json" for name in results]


def test_differences_are_those_of_paired_tests(tmp_path: Path) -> None:
    first, second = _result(1, 0.4), _result(2, 0.6)
    a, b = _write(tmp_path, a=first, b=second)
    output = tmp_path / "compare.json"
    found = run_compare(CompareConfig.parse({"first": a, "second": b, "output": output}))
    assert json.loads(output.read_text()) == json.loads(json.dumps(found))
    right = [[one["choice"] == "A" for one in result["questions"]] for result in (first, second)]
    test = stats.ttest_rel([*map(float, right[1])], [*map(float, right[0])])
    interval = test.confidence_interval(0.95)
    assert found["difference"] == pytest.approx(second["micro"] - first["micro"])
    assert found["interval"] == pytest.approx([interval.low, interval.high])
    assert found["p_value"] == pytest.approx(test.pvalue)
    table = found["mcnemar"]
    split = [table["only_first"], table["only_second"]]
    assert split == [sum(x and not y for x, y in zip(*pair)) for pair in (right, right[::-1])]  # noqa: B905
    assert table["p_value"] == pytest.approx(stats.binomtest(split[0], sum(split)).pvalue)
    assert table["both"] + table["neither"] + sum(split) == found["total"] == 120
    assert len(found["changed"]) == sum(split) == found["choices_changed"]
    one = found["subjects"]["subject 2"]
    own = [values[2::4] for values in right]
    assert (one["first"], one["second"]) == (sum(own[0]) / 30, sum(own[1]) / 30)
    page = read_page(tmp_path / "compare.html")
    assert f"{found['difference']:+.2%}" in page.text
    assert "subject 2" in page.text


def test_the_page_shows_what_was_asked(tmp_path: Path) -> None:
    rows = [
        {"question": f"Is it {i}?", "choices": ["yes", "no"], "answer": "A", "subject": name}
        for name in (f"subject {i}" for i in range(4))
        for i in range(30)
    ]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": "m", "file": str(asked)}
    a, b = _write(
        tmp_path, a=_result(1, 0.4, settings=settings), b=_result(2, 0.6, settings=settings)
    )
    config = CompareConfig.parse({"first": a, "second": b, "output": tmp_path / "compare.json"})
    run_compare(config)
    first = read_page(tmp_path / "compare.html").questions[0]
    assert first["text"] == f"Is it {first['index']}?\nA. yes\nB. no"
    asked.write_text(json.dumps(rows[0]))
    run_compare(config)
    page = read_page(tmp_path / "compare.html")
    assert "texts aren't shown: the files have another question subject 1 0 by now" in page.text
    assert "text" not in page.questions[0]


def test_a_result_equals_itself() -> None:
    found = compare(_result(1, 0.5), _result(1, 0.5), ("a", "b"))
    assert (found["difference"], found["p_value"], found["mcnemar"]["p_value"]) == (0.0, 1.0, 1.0)
    assert (found["interval"], found["choices_changed"]) == ([0.0, 0.0], 0)


def test_other_prompts_are_refused() -> None:
    first = _result(1, 0.5)
    with pytest.raises(DataError, match=r"a and b are of different prompts \(shots 5 and 0\)"):
        compare(first, _result(1, 0.5, prompt_sha256="cd" * 32, shots=0), ("a", "b"))
    with pytest.raises(DataError, match="list different questions"):
        compare(first, first | {"questions": first["questions"][:-1]}, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"benchmark": "mmlu", "quest', "is not JSON"),
        ("[]", "it has no questions"),
        ('{"benchmark": "harness", "micro": 1}', "it has no questions, prompt_sha256, settings"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_result(tmp_path / "x.json")
    with pytest.raises(DataError, match="No such file"):
        read_result(tmp_path / "none.json")
