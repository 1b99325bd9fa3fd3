"""Upload the trained model to the hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from data.storage import first_line


def check_push(repository: str) -> None:
    """Refuse to train for an upload that cannot succeed. Make the repository, private, if the hub does not have it.

    Raises:
        ValueError: no token, no network, or no permission to write.
    """
    hub = HfApi()
    try:
        try:
            hub.auth_check(repository, write=True)
        except RepositoryNotFoundError:
            hub.create_repo(repository, private=True)
    except Exception as error:  # of the hub, the network or the token
        raise ValueError(
            f"trainer.push_to_hub={repository}: {first_line(error)}. Give OWNER/NAME with an owner that you may write "
            "for; `hf auth login` gives a token"
        ) from error


def push(directory: Path, repository: str) -> str:
    """Upload the files of a directory. Return the address.

    Raises:
        OSError: the upload failed; the message gives the command that repeats it.
    """
    try:
        HfApi().upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:  # of the hub or the network
        raise OSError(
            f"{directory} is written, but not uploaded ({first_line(error)}): hf upload {repository} {directory}"
        ) from error
    return f"https://huggingface.co/{repository}"
