"""Prompt files and batches."""

import pytest

from fewstep.prompts import BadPrompts, Batches, read


def write(tmp_path, data):
    path = tmp_path / "p.txt"
    path.write_bytes(data)
    return path


def test_bom_crlf_blank_lines_and_repeats(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfa cat\r\n\r\n  a dog \r\na cat\r\nna\xc3\xafve")
    assert read(path) == ["a cat", "a dog", "naïve"]


def test_a_prompt_as_long_as_512_tokens_is_read(tmp_path):
    assert read(write(tmp_path, b"a cat " * 600)) == [("a cat " * 600).strip()]  # some 3600 characters


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"fine\n\xff\xfe\n", r"line 2: not UTF-8 text \(byte 1\); save the file as UTF-8"),
        (b"a\n\nb\0c\n", "line 3: holds a NUL"),
        (b"x" * 100_000, "line 1: 100000 characters"),
    ],
)
def test_bad_files_name_the_line(tmp_path, data, words):
    with pytest.raises(BadPrompts, match=words):
        read(write(tmp_path, data))


def test_missing_file(tmp_path):
    with pytest.raises(BadPrompts, match=r"no\.txt: cannot be read"):
        read(tmp_path / "no.txt")


def test_groups_are_side_by_side_and_an_epoch_holds_each_prompt_once():
    batches = Batches(list("abcde"), groups=2, group_size=3, seed=0)
    prompts, group = batches.next()
    assert group.tolist() == [0, 0, 0, 1, 1, 1]
    assert prompts[0] == prompts[1] == prompts[2] and prompts[3] == prompts[4] == prompts[5]
    drawn = [prompts[0], prompts[3]]
    for _ in range(4):
        prompts, _ = batches.next()
        drawn += [prompts[0], prompts[3]]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list("abcde") and drawn[:5] != drawn[5:]


def test_position_is_all_there_is_to_restore():
    first = Batches(list("abcdefg"), 2, 1, seed=3)
    for _ in range(5):
        first.next()
    second = Batches(list("abcdefg"), 2, 1, seed=3)
    second.load_state(first.state())
    assert [first.next()[0] for _ in range(9)] == [second.next()[0] for _ in range(9)]
    for others in ("abcdefh", "abcdef", "bacdefg"):
        with pytest.raises(BadPrompts, match=f"these {len(others)} prompts are not, in this order, those that the run began with"):
            Batches(list(others), 2, 1, seed=3).load_state(first.state())
    assert Batches(list("abcdefg"), 7, 1, seed=4).next()[0] != Batches(list("abcdefg"), 7, 1, seed=3).next()[0]


def test_no_order_of_an_epoch_comes_again_under_another_seed():
    """Else runs that only differ in their seed would see the same batches, some epochs apart."""
    orders = []
    for seed in range(5):
        batches = Batches(list("abcdefghij"), 10, 1, seed=seed)
        orders += [tuple(batches.next()[0]) for _ in range(5)]
    assert len(set(orders)) == 25


def test_the_prompts_ahead_are_those_that_come():
    batches = Batches([str(i) for i in range(20)], groups=3, group_size=2, seed=1)
    for _ in range(5):  # into the second epoch at the end of what is asked for
        batches.next()
    before = batches.state()
    ahead = {many: set(batches.ahead(many)) for many in (0, 1, 3, 100)}
    assert batches.state() == before
    come: set[str] = set()
    for many in range(1, 4):
        come |= set(batches.next()[0])
        assert ahead.get(many, come) == come
    assert not ahead[0] and ahead[100] == set(batches.prompts)


def test_more_groups_than_prompts_are_still_groups_of_their_own():
    prompts, group = Batches(["a"], groups=3, group_size=2, seed=0).next()
    assert prompts == ["a"] * 6 and group.tolist() == [0, 0, 1, 1, 2, 2]
