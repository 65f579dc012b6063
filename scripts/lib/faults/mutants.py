"""Break one promise of pmerge at a time in a copy of the sources: the test named after it must
notice.

A mutant is a piece of text, found exactly once in any file of merge_cli, and what takes its place.
If it is not found, the code has moved on and the mutant has to follow: that is an error, never a
success. Mutants that no test has to notice (each is harmless: something else keeps the promise) are
not listed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[3]
COPIED = ("merge_cli", "scripts", "tests", "docs", "README.md", "pyproject.toml")
POWER = "test_promise_3_after_power_loss_a_result_is_absent_or_complete_and_after_exit_0_it_is_there"
OUTPUT_ERRORS = "test_promise_9_output_errors_are_said_and_lose_nothing"
SHORT = "test_promise_9_short_writes_and_reads_are_continued"
CHANGED = "test_promise_7_inputs_that_change_during_the_run_stop_it"
DAMAGED = "test_promise_4_damaged_finished_files_are_written_again"
RANKS = "test_ranks_one_after_the_other_give_the_bytes_of_one_run"


class Mutant(NamedTuple):
    """`old` becomes `new`; the test of this name must fail."""

    name: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant(
        "shard: no fsync",
        "memoryview(file.header), 0, path)\n            fsync_file(fd)\n",
        "memoryview(file.header), 0, path)\n",
        POWER,
    ),
    Mutant(
        "small files: no fsync",
        "            if durable:\n                fsync_file(fd)\n            self.rename",
        "            self.rename",
        POWER,
    ),
    Mutant(
        "publish: parent folder not synced",
        "    try:\n        folder.above.sync()\n    except",
        "    try:\n        pass\n    except",
        POWER,
    ),
    Mutant(
        "ranks: piece not synced",
        "                fsync_file(fd)\n                self._staging.sync(GROWING)\n",
        "",
        POWER,
    ),
    Mutant(
        "fsync errors swallowed",
        "        os.fsync(fd)\n    except OSError as error:\n        if error.errno not in NOT_SUPPORTED:\n            raise\n",
        "        os.fsync(fd)\n    except OSError:\n        pass\n",
        OUTPUT_ERRORS,
    ),
    Mutant(
        "by-file publishing: index first",
        "return (2 if is_index else name == MANIFEST, name)",
        "return (0 if is_index else 1 + (name == MANIFEST), name)",
        "test_promise_2_and_3_killed_anywhere_it_is_absent_or_complete_and_goes_on",
    ),
    Mutant(
        "lock dropped",
        "            return flock(fd, shared=self._shared)\n",
        "            return True\n",
        "test_promise_11_a_lock_on_a_folder_that_was_removed_is_not_held",
    ),
    Mutant(
        "short read taken for whole",
        "            done += count\n\n    def read_direct",
        "            done = wanted\n\n    def read_direct",
        SHORT,
    ),
    Mutant(
        "short write taken for whole", "        done += count\n\n\ndef reserve", "        done = len(data)\n\n\ndef reserve", SHORT
    ),
    Mutant(
        "changed input ignored",
        "            if (status.st_size, status.st_mtime_ns) != (self.num_bytes, self._mtime_ns):",
        "            if False:",
        CHANGED,
    ),
    Mutant("changed input: final look dropped", "    check_inputs_unchanged(merge)\n", "", CHANGED),
    Mutant("changed header ignored", "    if hashlib.sha256(header).hexdigest() != file.header.sha256:", "    if False:", CHANGED),
    Mutant(
        "--verify-resume hashes nothing",
        "        if status.st_mtime_ns == record.mtime_ns and not hashed:",
        "        if status.st_mtime_ns == record.mtime_ns:",
        DAMAGED,
    ),
    Mutant(
        "resume: size and time not compared",
        "        if status.st_mtime_ns == record.mtime_ns and not hashed:",
        "        if not hashed:",
        DAMAGED,
    ),
    Mutant(
        "resume: another request continued",
        "        if self.recorded_state() == self.state:\n            return\n",
        "        if True:\n            return\n",
        "test_promise_4_another_request_is_refused_with_the_differences",
    ),
    Mutant(
        "overwrite: old removed first",
        "        if _exchange(folder):\n            try:\n",
        '        folder.above.remove(folder.destination.name)\n        if not _rename(folder, CHECKPOINT, ""):\n            try:\n',
        "test_promise_2_overwrite_loses_neither_the_old_nor_the_new",
    ),
    Mutant(
        "ranks: pieces that do not cover a file accepted",
        "        return begin >= item.end\n",
        "        return bool(records)\n",
        RANKS,
    ),
    Mutant(
        "publish: files that are not recorded accepted",
        "    if strangers := sorted(found.keys() - files.keys()):",
        "    if strangers := []:",
        "test_files_that_are_not_recorded_are_refused_by_name",
    ),
    Mutant(
        "publish: changed files accepted",
        "name not in same or not folder.records.matches(name, record)]",
        "name not in same]",
        "test_files_that_have_changed_since_they_were_recorded_are_not_published",
    ),
    Mutant(
        "publish: side files of an earlier try kept",
        "        each.folder.records.remove_side_files(each.merge.files)\n",
        "        pass\n",
        "test_a_side_file_that_is_gone_from_the_base_is_not_published",
    ),
    Mutant(
        "overwrite: the old result is not looked at again",
        '    if names := strangers(path, sorted(old.files("."))):\n',
        "    if names := []:\n",
        "test_files_that_others_put_into_the_old_result_during_the_run_stop_it",
    ),
    Mutant(
        "overwrite: all of the old result removed",
        "        if not folder.held.remove_if_empty(part) and not all(map(is_held_by_nfs, folder.held.files(part))):\n",
        "        folder.held.remove(part)\n        if False:\n",
        "test_files_that_come_after_the_exchange_are_kept_and_named",
    ),
    Mutant(
        "ranks: one name for all processes that write a file",
        'return f"{GROWING}/{short}.{_host()}.{pid}.{start_time(pid)}.{secrets.token_hex(4)}"',
        'return f"{GROWING}/{short}.{_host()}"',
        "test_two_ranks_may_write_one_file",
    ),
    Mutant(
        "verify: index not checked",
        "            problems += check_index(",
        "            problems += [] and check_index(",
        "test_the_index_must_fit_the_shards_whatever_the_checksums_say",
    ),
    Mutant(
        "verify: seal ignored",
        '"ok" if is_sealed(raw) else',
        '"ok" if True else',
        "test_a_flipped_bit_in_any_file_is_found",
    ),
    Mutant(
        "verify: sha256 of weights ignored",
        "            if found != record.sha256:",
        "            if found != record.sha256 and name not in weights:",
        "test_a_flipped_bit_in_any_file_is_found",
    ),
    Mutant(
        "verify: compares nothing with the inputs",
        "            if there != data:",
        "            if False:",
        "test_weights_that_are_not_the_average_are_found_whatever_the_checksums_say",
    ),
    Mutant(
        "verify: headers not compared with the plan",
        "        if header != file.header:",
        "        if False:",
        "test_files_that_are_not_those_of_the_inputs_are_found",
    ),
    Mutant(
        "verify: set of files not compared with the plan",
        "        elif name not in listed:\n",
        "        elif name not in listed and False:\n",
        "test_files_that_are_not_those_of_the_inputs_are_found",
    ),
    Mutant(
        "verify: method not compared with its coefficients",
        "    if not _are_equal(given, output.coefficients):",
        "    if False:",
        "test_a_record_that_does_not_fit_itself_is_found",
    ),
    Mutant(
        "headers of all checkpoints without a bound",
        "            if self._spent <= self._max_bytes:",
        "            if True:",
        "test_the_headers_of_all_checkpoints_together_are_bounded",
    ),
    Mutant(
        "headers not read back",
        "    _check_complete(merge, staging.path / CHECKPOINT)\n",
        "",
        "test_a_header_that_cannot_be_read_back_is_not_published",
    ),
    Mutant(
        "writers of inputs not looked for",
        "    if writer is not None:",
        "    if False:",
        "test_an_input_that_a_process_may_write_to_stops_the_run_and_both_are_named",
    ),
    Mutant(
        "deep JSON accepted",
        "        if is_too_deep(value):",
        "        if False:",
        "test_what_is_no_json_to_work_with_is_a_value_error",
    ),
    Mutant(
        "a FIFO taken for a file",
        "        if not stat.S_ISREG(status.st_mode):\n            raise OSError(errno.EINVAL",
        "        if False:\n            raise OSError(errno.EINVAL",
        "test_a_file_that_is_none_is_an_error_at_once",
    ),
    Mutant(
        "records of two names shared",
        '.replace("%", "%25")',
        "",
        "test_the_names_of_records_are_short_and_differ_where_the_names_of_files_do",
    ),
    Mutant(
        "publish: rename not undone when its sync fails",
        "            _take_back(folder)\n",
        "            pass\n",
        "test_a_result_whose_name_cannot_be_made_durable_is_taken_back",
    ),
    Mutant(
        "overwrite: old result not put back at once",
        '    except BaseException:\n        _rename(folder, _REPLACED, "")\n        raise\n',
        "    except BaseException:\n        raise\n",
        "test_an_old_result_that_was_moved_aside_is_put_back",
    ),
    Mutant(
        "overwrite: old result not put back by the next run",
        "        _put_back_replaced(folder)\n",
        "        pass\n",
        "test_an_old_result_that_was_moved_aside_is_put_back",
    ),
    Mutant(
        "ranks: inode of a piece's record ignored",
        '(record.get("inode"), record.get("request")) == (inode, self.request)',
        'record.get("request") == self.request',
        "test_pieces_count_only_for_their_request_and_in_their_file",
    ),
    Mutant(
        "ranks: request of a piece's record ignored",
        '(record.get("inode"), record.get("request")) == (inode, self.request)',
        'record.get("inode") == inode',
        "test_pieces_count_only_for_their_request_and_in_their_file",
    ),
    Mutant(
        "shard: header written first",
        "            self._written[offset] = offset + len(data)\n",
        "            self._written[offset] = offset + len(data)\n            os.pwrite(self._fd, self.file.header, 0)\n",
        "test_the_header_comes_last_so_that_a_torn_file_is_no_checkpoint",
    ),
)


def carry_out(only: str = "") -> bool:
    """Try the mutants whose name contains `only`; whether each was noticed by its test, which
    passes without it.
    """
    began, counts = time.monotonic(), {True: 0, False: 0}
    sound: dict[str, bool] = {}
    for mutant in MUTANTS:
        if only in mutant.name:
            wrong = "; ".join(tried(mutant, sound))
            counts[not wrong] += 1
            print(f"      {'UNNOTICED' if wrong else 'noticed':11}{mutant.name}{': ' + wrong if wrong else ''}", flush=True)
    total = f"{sum(counts.values())} mutants, {counts[True]} noticed, {counts[False]} not"
    print(f"{'FAIL' if counts[False] or not counts[True] else 'PASS'}  mutants: {total}, {time.monotonic() - began:.0f} s")
    return bool(counts[True]) and not counts[False]


def tried(mutant: Mutant, sound: dict[str, bool]) -> Iterator[str]:
    """The faults of a mutant or its test. `sound` remembers which tests pass without a mutant."""
    with tempfile.TemporaryDirectory(prefix="pmerge-mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = REPOSITORY / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        found = [path for path in (copy / "merge_cli").rglob("*.py") for _ in range(path.read_text().count(mutant.old))]
        tests = [path for path in (copy / "tests").rglob("test_*.py") if f"def {mutant.test}(" in path.read_text()]
        if len(tests) == 1 and mutant.test not in sound:
            sound[mutant.test] = passes(copy, tests[0], mutant.test)
        if len(found) != 1:
            yield f"its text is in {len(found)} places of merge_cli, not in one"
        elif len(tests) != 1:
            yield f"{len(tests)} files have a test {mutant.test}"
        elif sound[mutant.test]:
            found[0].write_text(found[0].read_text().replace(mutant.old, mutant.new))
            if passes(copy, tests[0], mutant.test):
                yield f"{mutant.test} passes"
        else:
            yield f"{mutant.test} fails without it"


def passes(copy: Path, file: Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(file), "-k", test]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{copy}:{copy / 'scripts/lib'}",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=900)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
