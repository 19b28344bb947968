"""Rows of sources, as the program finds and reads them."""

from llmtune.data.reading.data_file import read_records
from llmtune.data.reading.find_files import find_files


def read_rows(sources, *, purpose="train", max_samples=None):
    """Yield every row of the sources in order; a record that is no row comes out as the reason why."""
    files = find_files(sources, purpose)
    for index, record in read_records(files, max_samples):
        yield files[index].parse(record)
