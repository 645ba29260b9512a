"""Bugs planted in the tiers, and the test that sees each of them.

A planted bug is a replacement in the text of one module, which takes the healthy one's place wherever it was imported. When the
text is gone the test says so: plant the bug anew, or drop it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_disk_pages
import test_host_pages
import test_offload
import test_offload_folder
from faulty_files import FaultyFiles
from test_disk_pages import disk, held, quick_path  # noqa: F401  fixtures

DISK, FOLDER, HOST, BOTH = test_disk_pages, test_offload_folder, test_host_pages, test_offload


class Bug(NamedTuple):
    """`old` becomes `new` in a module of `jaxpaged.offload`; `check` is the test that fails then, with these arguments."""

    name: str
    module: str
    old: str
    new: str
    tests: Any
    check: str
    arguments: dict[str, Any] = {}  # noqa: RUF012  a NamedTuple's default, never changed

    def __str__(self) -> str:
        return self.name


RANDOM = {"dtype": "bfloat16", "page_size": 4, "memory_kind": None}
FLOAT32 = {"dtype": "float32"}
ONLY = "test_only_left_overs_are_removed"
IN_PLACE = "test_a_load_works_in_place_and_a_save_leaves_the_pool_alone"
OPERATIONS = "test_random_operations_end_as_in_numpy"
WHOLE_SWEEP = "test_one_failed_call_is_one_missing_page"

BUGS = (
    Bug("an older save overwrites a newer", "host_pages", " if self._source.get(slot) is saved}", "}", HOST, OPERATIONS, RANDOM),
    Bug(
        "a load does not wait for a save",
        "host_pages",
        "            self._settle([slot for slot, _ in part])\n",
        "",
        HOST,
        OPERATIONS,
        RANDOM,
    ),
    Bug("a read does not wait for a save", "host_pages", "        self._settle([slot])\n", "", HOST, OPERATIONS, RANDOM),
    Bug(
        "a save lands on what was written", "host_pages", "_source.pop(slot, None)", "_source.get(slot)", HOST, OPERATIONS, RANDOM
    ),
    Bug(
        "values come back as keys",
        "host_pages",
        "k[index], v[index] = self",
        "v[index], k[index] = self",
        HOST,
        OPERATIONS,
        RANDOM,
    ),
    Bug(
        "a page is left out of a long list",
        "host_pages",
        "range(0, len(pairs), size)",
        "range(0, len(pairs), size + 1)",
        HOST,
        OPERATIONS,
        RANDOM,
    ),
    Bug(
        "padding is no number",
        "host_pages",
        "k[len(part) :] = v[len(part) :] = 0",
        "k[len(part) :] = v[len(part) :] = 65535",
        HOST,
        "test_padding_leaves_the_null_page_finite",
    ),
    Bug("the pool is copied", "host_pages", "donate_argnums=0", "donate_argnums=()", HOST, IN_PLACE, FLOAT32),
    Bug(
        "the pool is given away to a save",
        "host_pages",
        "kv_cache.gather_pages, config=model))",
        "kv_cache.gather_pages, config=model), donate_argnums=0)",
        HOST,
        IN_PLACE,
        FLOAT32,
    ),
    Bug(
        "one more on its way",
        "host_pages",
        ">= self.max_in_flight",
        "> self.max_in_flight",
        HOST,
        "test_saves_on_their_way_are_few_and_nobody_waits_for_the_others",
    ),
    Bug(
        "a size is not warmed up",
        "host_pages",
        "for size in self.sizes:\n",
        "for size in self.sizes[1:]:\n",
        HOST,
        "test_nothing_compiles_after_warm_up",
    ),
    Bug(
        "the payload is not in the digest",
        "page_file",
        "    digest.update(payload)\n",
        "",
        DISK,
        "test_any_flipped_bit_is_a_miss",
    ),
    Bug(
        "the key is not read",
        "page_file",
        "bytes(head) != _head(key, into) + key",
        "bytes(head)[:56] != _head(key, into)",
        DISK,
        "test_any_flipped_bit_is_a_miss",
    ),
    Bug(
        "a longer file will do",
        "page_file",
        "if size != expected",
        "if size < expected",
        DISK,
        "test_a_damaged_file_is_a_miss_and_can_be_spilled_anew",
        {"damage": DISK.DAMAGE["a byte long"]},
    ),
    Bug(
        "a short write is taken for a whole one",
        "files",
        "content = content[count:]",
        "return",
        DISK,
        WHOLE_SWEEP,
        {"fault": "short"},
    ),
    Bug(
        "a short read is taken for a whole one",
        "files",
        "            num_read += count\n",
        "            return num_read + count\n",
        DISK,
        WHOLE_SWEEP,
        {"fault": "short"},
    ),
    Bug(
        "spills are not copied",
        "disk_pages",
        "return bytes(payload)",
        "return payload",
        DISK,
        "test_a_spill_is_fetched_before_it_is_written",
    ),
    Bug(
        "a spill in flight is not there",
        "disk_pages",
        "self._spills.get(fetch.key), fetch.key in",
        "None, fetch.key in",
        DISK,
        "test_a_spill_is_fetched_before_it_is_written",
    ),
    Bug(
        "the older of two spills stays",
        "disk_pages",
        "is not payload and not",
        "is None and not",
        DISK,
        "test_the_newest_of_two_spills_stays_when_the_older_is_being_written",
    ),
    Bug(
        "a lost spill is not told",
        "disk_pages",
        "        self._lost[key] = None\n",
        "",
        DISK,
        "test_a_spill_too_many_is_lost_and_told",
    ),
    Bug(
        "spills have no bound",
        "disk_pages",
        "if queued_bytes <= self._max_queued_bytes else",
        "if True else",
        DISK,
        "test_a_spill_too_many_is_lost_and_told",
    ),
    Bug(
        "what a lost spill was to replace is found",
        "disk_pages",
        ", fetch.key in self._lost",
        ", False",
        DISK,
        "test_a_lost_spill_is_told_once_also_when_its_page_is_asked_for_before",
    ),
    Bug(
        "a lost spill is told twice",
        "disk_pages",
        "            self._lost.pop(fetch.key, None)\n",
        "",
        DISK,
        "test_a_lost_spill_is_told_once_also_when_its_page_is_asked_for_before",
    ),
    Bug(
        "bytes in flight are never given back",
        "disk_pages",
        "self._queued_bytes -= len(payload)",
        "pass",
        DISK,
        "test_the_newest_of_two_spills_stays_when_the_older_is_being_written",
    ),
    Bug(
        "writes go before reads",
        "disk_pages",
        "popleft() if self._to_read else None",
        "popleft() if self._to_read and not self._to_write else None",
        DISK,
        "test_reads_go_before_writes",
    ),
    Bug(
        "a damaged file is kept",
        "disk_pages",
        "            page_file.remove(self._files, self._folder.descriptor, fetch.key)\n",
        "            pass\n",
        DISK,
        "test_a_damaged_file_is_a_miss_and_can_be_spilled_anew",
        {"damage": DISK.DAMAGE["zeros"]},
    ),
    Bug(
        "trouble is said every time",
        "trouble",
        "_num_good_needed = CALM",
        "_num_good_needed = 0",
        DISK,
        "test_trouble_is_said_once_and_again_after_it_was_over",
    ),
    Bug(
        "trouble is said once for ever",
        "trouble",
        "_num_good_needed -= 1",
        "_num_good_needed -= 0",
        DISK,
        "test_trouble_is_said_once_and_again_after_it_was_over",
    ),
    Bug(
        "the folder of a living engine is removed",
        "files",
        "            return False\n        return True",
        "            return True\n        return True",
        FOLDER,
        ONLY,
    ),
    Bug(
        "a folder that is gone is used",
        "folder",
        "files.is_at(lock, _LOCK, folder):\n                    undo",
        "True:\n                    undo",
        FOLDER,
        "test_a_folder_that_was_taken_for_a_left_over_is_not_used",
    ),
    Bug("links are followed", "files", "os.O_RDONLY | os.O_NOFOLLOW", "os.O_RDONLY", FOLDER, ONLY),
    Bug("any name will do", "folder", "filter(_OURS.fullmatch, self", "filter(None, self", FOLDER, ONLY),
    Bug("any file is removed", "folder", "filter(page_file.is_file_name, files", "filter('lock'.__ne__, files", FOLDER, ONLY),
    Bug("the lock goes first", "folder", "if files.names(folder) == [_LOCK]", "if files.names(folder)", FOLDER, ONLY),
    Bug(
        "another user's folder is removed",
        "folder",
        "st_uid != os.geteuid()",
        "st_uid < 0",
        FOLDER,
        "test_another_users_left_over_is_left",
    ),
    Bug("left-overs stay", "folder", "                self._remove_left_overs()\n", "", FOLDER, ONLY),
    Bug(
        "everybody may look", "files", "os.mkdir(name, 0o700", "os.mkdir(name, 0o755", DISK, "test_the_files_are_for_nobody_else"
    ),
    Bug(
        "a spill reads what a save has brought",
        "transfer",
        "        if self.disk is not None:\n            for slot, key in transfers.spills:",
        "        host.save(cache, transfers.saves)\n"
        "        if self.disk is not None:\n            for slot, key in transfers.spills:",
        BOTH,
        "test_the_order_is_spills_saves_loads_fetches",
    ),
    Bug(
        "a save lands on what was fetched",
        "transfer",
        "host.overwrite(slot)",
        "host._view(slot)",
        BOTH,
        "test_a_fetch_is_not_overwritten_by_a_save_that_was_on_its_way",
    ),
    Bug(
        "a stall is not counted",
        "transfer",
        "self._stalled_s + host.waited_s",
        "self._stalled_s",
        BOTH,
        "test_a_stall_is_said_once_when_a_step_has_waited",
    ),
    Bug(
        "measuring counts",
        "transfer",
        "host.num_saved, host.num_loaded, host.waited_s = totals",
        "del totals",
        BOTH,
        "test_costs_are_measured_on_the_null_page_and_leave_everything_as_it_was",
    ),
)


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The module with its bug in place of the healthy one, in the other modules of the tiers and in the tests."""
    name = f"jaxpaged.offload.{bug.module}"
    healthy = importlib.import_module(name)
    path = Path(healthy.__file__ or "")
    source = path.read_text()
    if source.count(bug.old) != 1:
        raise LookupError(f"{path.name}: this bug's text stands {source.count(bug.old)} times there; plant it anew: {bug.old!r}")
    module = importlib.util.module_from_spec(healthy.__spec__)  # type: ignore[arg-type]
    exec(compile(source.replace(bug.old, bug.new), str(path), "exec"), vars(module))
    sick = {id(healthy): module}
    sick |= {id(x): vars(module)[key] for key, x in vars(healthy).items() if getattr(x, "__module__", None) == name}
    others = [other for key, other in sys.modules.items() if key.startswith("jaxpaged.offload") and other is not healthy]
    others += [DISK, FOLDER, HOST, BOTH]
    found = [(other, key, x) for other in others for key, x in vars(other).items() if id(x) in sick]
    bases = FaultyFiles.__bases__
    for other, key, x in found:
        setattr(other, key, sick[id(x)])
    FaultyFiles.__bases__ = tuple(sick.get(id(base), base) for base in bases)
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.modules[name] = healthy
        FaultyFiles.__bases__ = bases
        for other, key, x in found:
            setattr(other, key, x)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_seen(bug: Bug, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    check = getattr(bug.tests, bug.check)
    with planted(bug):
        if bug.tests is HOST:
            monkeypatch.setattr(HOST.host_pages, "MAX_CALL_PAGES", HOST.MOST)
        names = [name for name in inspect.signature(check).parameters if name not in bug.arguments]
        arguments = bug.arguments | {name: request.getfixturevalue(name) for name in names}
        try:
            check(**arguments)
        except (Exception, pytest.fail.Exception):  # of the test, or of the broken code
            return
    pytest.fail(f"{bug.check} does not see that {bug}")
