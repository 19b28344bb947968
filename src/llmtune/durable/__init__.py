"""The only folder of code that writes, syncs, renames, links or deletes files (P1).

`write_bytes`, `write_text`, `write_json` and `write_tensors` write one file, `commit_file` one that a library writes,
`commit_folder` a folder with its manifest: each is complete under its name or does not exist. `AppendLog` grows line by
line. `remove_leftovers` cleans up after a killed process; `verify_manifest` compares a folder with what was committed.
`use_backend` replaces the operating system underneath, for tests.

Not covered: a file system that tears a rename apart, and a disk that claims to have synced and has not.
"""

from llmtune.durable.files import (
    UNFINISHED_PREFIX,
    AppendLog,
    append_line,
    json_text,
    link_or_copy,
    make_folder,
    read_lines,
    rename,
    replace_symlink,
    write_bytes,
    write_json,
    write_stream,
    write_text,
)
from llmtune.durable.folders import (
    commit_file,
    commit_folder,
    prepare_target,
    remove_leftovers,
    remove_tree,
)
from llmtune.durable.lock import FileLock, ReadLock, delete_unless_locked, is_locked, waiting_lock
from llmtune.durable.manifest import (
    MANIFEST,
    DamagedManifestError,
    Manifest,
    has_digest,
    read_manifest,
    verify_manifest,
)
from llmtune.durable.system import Backend, SystemBackend, errno_of, translate_os_errors, use_backend
from llmtune.durable.tensors import read_tensors, tensor_order, write_tensors

__all__ = [
    "MANIFEST",
    "UNFINISHED_PREFIX",
    "AppendLog",
    "Backend",
    "DamagedManifestError",
    "FileLock",
    "Manifest",
    "ReadLock",
    "SystemBackend",
    "append_line",
    "commit_file",
    "commit_folder",
    "delete_unless_locked",
    "errno_of",
    "has_digest",
    "is_locked",
    "json_text",
    "link_or_copy",
    "make_folder",
    "prepare_target",
    "read_lines",
    "read_manifest",
    "read_tensors",
    "remove_leftovers",
    "remove_tree",
    "rename",
    "replace_symlink",
    "tensor_order",
    "translate_os_errors",
    "use_backend",
    "verify_manifest",
    "waiting_lock",
    "write_bytes",
    "write_json",
    "write_stream",
    "write_tensors",
    "write_text",
]
