"""Reading the benchmarks' CSV files, and what is wrong with them."""

from pathlib import Path

import pytest

from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.questions import read_subjects
from glm3cli.evals.suites.ceval import CEVAL
from glm3cli.evals.suites.cmmlu import CMMLU
from glm3cli.evals.suites.mmlu import MMLU
from tests.support.exam import write_csv, write_exam
from tests.support.shared import SHARED, needs_shared

GOOD = ("Q?", "1", "2", "3", "4", "A")


@needs_shared
def test_reads_all_of_mmlu() -> None:
    subjects = read_subjects(MMLU, SHARED / "mmlu" / "data")
    assert len(subjects) == 57
    assert sum(len(subject.questions) for subject in subjects) == 14_042
    assert all(len(subject.shots) == 5 for subject in subjects)
    assert all(MMLU.knows(subject.name) for subject in subjects)
    cells = [cell for s in subjects for q in s.questions for cell in q.choices]
    assert cells.count("None") == 10  # ten choices that other readers take for nothing


@needs_shared
def test_finds_the_data_folder_inside() -> None:
    outside, inside = SHARED / "mmlu", SHARED / "mmlu" / "data"
    assert read_subjects(MMLU, outside, ["virology"]) == read_subjects(MMLU, inside, ["virology"])


def test_takes_subjects_shots_and_limit(tmp_path: Path) -> None:
    folder = write_exam(tmp_path, {"law": 4, "art": 3, "sport": 2}, num_shots=3)
    subjects = read_subjects(MMLU, folder, ["sport", "art"], num_shots=2, limit=2)
    assert [(s.name, len(s.questions), len(s.shots)) for s in subjects] == [
        ("art", 2, 2),
        ("sport", 2, 2),
    ]
    assert [question.index for question in subjects[0].questions] == [0, 1]


def test_strings_stay_as_they_are(tmp_path: Path) -> None:
    row = (" two\nlines, ", "None", "NA", "", "1e5", "D")
    path = tmp_path / "test" / "x_test.csv"
    write_csv(path, [row])
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + path.read_bytes())
        question = read_subjects(MMLU, tmp_path, num_shots=0)[0].questions[0]
        assert (question.text, *question.choices, question.answer) == row


def test_reads_ceval_by_its_header(tmp_path: Path) -> None:
    header = ("id", "question", "A", "B", "C", "D", "answer")
    write_csv(tmp_path / "val" / "law_val.csv", [header, ("0", *GOOD)])
    write_csv(tmp_path / "dev" / "law_dev.csv", [(*header, "explanation"), ("0", *GOOD, "why")])
    (subject,) = read_subjects(CEVAL, tmp_path, num_shots=1)
    assert subject.name == "law"
    assert subject.questions == subject.shots
    assert subject.questions[0].choices == ("1", "2", "3", "4")


def test_reads_cmmlu_by_its_header(tmp_path: Path) -> None:
    header = ("", "Question", "A", "B", "C", "D", "Answer")
    for split in ("test", "dev"):
        path = tmp_path / split / "agronomy.csv"
        write_csv(path, [header, ("0", *GOOD)])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (subject,) = read_subjects(CMMLU, tmp_path, num_shots=1)
    assert (subject.name, subject.questions[0].text) == ("agronomy", "Q?")


def _with_test_rows(folder: Path, *rows: tuple[str, ...]) -> Path:
    write_csv(folder / "test" / "x_test.csv", rows)
    return folder


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir .*/none does not exist"):
        read_subjects(MMLU, tmp_path / "none")


def test_folder_without_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder test"):
        read_subjects(MMLU, tmp_path)
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "test-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match=r"parquet files such as law/test-00000") as told:
        read_subjects(MMLU, tmp_path)
    assert "a CSV file per subject" in told.value.hint


def test_no_csv(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="test has no CSV files"):
        read_subjects(MMLU, tmp_path)


def test_no_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x_test\.csv has no questions"):
        read_subjects(MMLU, _with_test_rows(tmp_path), num_shots=0)


def test_wrong_number_of_columns_with_its_line(tmp_path: Path) -> None:
    folder = _with_test_rows(tmp_path, ("two\nlines", *GOOD[1:]), GOOD, GOOD[:5])
    with pytest.raises(DataError, match=r"x_test\.csv:4 has 5 columns instead of 6"):
        read_subjects(MMLU, folder, num_shots=0)


def test_answer_that_is_no_letter(tmp_path: Path) -> None:
    folder = _with_test_rows(tmp_path, GOOD, (*GOOD[:5], "E"))
    with pytest.raises(DataError, match=r"x_test\.csv:2 has the answer 'E'"):
        read_subjects(MMLU, folder, num_shots=0)


def test_missing_column(tmp_path: Path) -> None:
    write_csv(tmp_path / "val" / "law_val.csv", [("id", "question", "A", "B", "C", "answer")])
    with pytest.raises(DataError, match=r"law_val\.csv:1 has no column D"):
        read_subjects(CEVAL, tmp_path, num_shots=0)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x_test.csv").write_bytes("é,1,2,3,4,A\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x_test\.csv:1 is not CSV in UTF-8"):
        read_subjects(MMLU, tmp_path, num_shots=0)


def test_unknown_subject(tmp_path: Path) -> None:
    folder = write_exam(tmp_path, {"astronomy": 1, "law": 1})
    with pytest.raises(ConfigError) as error:
        read_subjects(MMLU, folder, ["astronmy", "law", "zzz"])
    assert error.value.message == (
        "--subjects: no subject 'astronmy', did you mean 'astronomy'?; no subject 'zzz'"
    )
    assert error.value.hint == "there are astronomy, law"


def test_too_few_shots(tmp_path: Path) -> None:
    folder = write_exam(tmp_path, {"law": 1}, num_shots=2)
    with pytest.raises(ConfigError, match=r"--shots 3, but .*law_dev\.csv has 2 rows"):
        read_subjects(MMLU, folder, num_shots=3)


def test_no_shots_for_a_subject(tmp_path: Path) -> None:
    folder = write_exam(tmp_path, {"law": 1, "art": 1})
    (folder / "dev" / "law_dev.csv").unlink()
    with pytest.raises(DataError, match="dev has no file for the subject law"):
        read_subjects(MMLU, folder)
