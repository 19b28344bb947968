"""The only place that writes, syncs, renames, links or deletes files; what it commits is whole or not there (P1).

`write_bytes`, `write_text`, `write_json`, `write_tensors` put one file in place, `commit_file` one that a library
writes; `commit_folder` a whole folder with its manifest; `AppendLog` is a file that grows line by line; `remove_tree`,
`remove_file`, `rename`, `make_folder`, `link_or_copy` are the rest; `remove_leftovers` cleans up after a killed
process, and `replace_target` before a commit; `verify_manifest` says whether a folder is still what was committed.
`use_backend` replaces the operating system underneath, for tests.

Not safe against a rename that a file system itself tears apart, nor against a disk that claims to have synced and has
not.
"""

from llmtune.durable.files import (
    UNFINISHED_PREFIX,
    json_text,
    link_or_copy,
    make_folder,
    point_to,
    rename,
    write_bytes,
    write_json,
    write_stream,
    write_text,
)
from llmtune.durable.folders import (
    MANIFEST,
    BrokenSealError,
    commit_file,
    commit_folder,
    has_digest,
    read_manifest,
    remove_file,
    remove_leftovers,
    remove_tree,
    replace_target,
    verify_manifest,
)
from llmtune.durable.lock import FileLock, ReadHold, delete_unless_held, is_locked
from llmtune.durable.log import AppendLog, read_lines
from llmtune.durable.system import (
    Backend,
    SystemBackend,
    errno_of,
    machine_error,
    translate_os_errors,
    use_backend,
)
from llmtune.durable.tensors import read_tensors, write_tensors

__all__ = [
    "MANIFEST",
    "UNFINISHED_PREFIX",
    "AppendLog",
    "Backend",
    "BrokenSealError",
    "FileLock",
    "ReadHold",
    "SystemBackend",
    "commit_file",
    "commit_folder",
    "delete_unless_held",
    "errno_of",
    "has_digest",
    "is_locked",
    "json_text",
    "link_or_copy",
    "machine_error",
    "make_folder",
    "point_to",
    "read_lines",
    "read_manifest",
    "read_tensors",
    "remove_file",
    "remove_leftovers",
    "remove_tree",
    "rename",
    "replace_target",
    "translate_os_errors",
    "use_backend",
    "verify_manifest",
    "write_bytes",
    "write_json",
    "write_stream",
    "write_tensors",
    "write_text",
]
