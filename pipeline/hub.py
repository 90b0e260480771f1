"""An artifact on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from benchmarks.data import DataError
from benchmarks.machine import Unavailable
from pipeline.checkpoint import first_line
from pipeline.manifest import MANIFEST, read


def push(folder: Path, repository: str) -> str:
    """Upload a released folder, and return the address of the commit.

    The repository is made if it is not there, and is private then. Files that an earlier artifact
    had and this one has not are deleted, so that the manifest is that of the whole; a repository
    of anything else is left as it is.

    Raises:
        DataError: the repository holds files, and not those of an artifact.
        Damaged: the folder is not what its manifest says.
        Unavailable: the hub, or the right to write to it, is not there.
    """
    _, about = read(folder)
    outcome = about["verdict"]["outcome"]
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        there = set(api.list_repo_files(repository)) - {".gitattributes"}
        if there and MANIFEST not in there:
            raise DataError(
                f"--push {repository}: found {len(there)} files of something else there, expected"
                " an empty repository or one that an artifact was pushed to; name another"
            )
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"secateur: {outcome} ({MANIFEST} names every file)",
            delete_patterns="*",
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise Unavailable(
            f"--push {repository}: the hub did not take it: {first_line(error)}; log in with"
            " `hf auth login`, and run the same command again: nothing is computed anew"
        ) from error
    return str(commit.commit_url)
