"""Upload the trained model to the hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from data.storage import first_line

FAILURES = (HfHubHTTPError, OSError, ValueError)  # of the hub, the network and the token


def check_push(repository: str) -> None:
    """Refuse to train for an upload that cannot succeed. Makes the repository, private, if the hub does not have it.

    Raises:
        ValueError: no token, no network, or no permission.
    """
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
    except FAILURES as error:
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
    except FAILURES as error:
        raise OSError(
            f"{directory} is written, but not uploaded ({first_line(error)}): hf upload {repository} {directory}"
        ) from error
    return f"https://huggingface.co/{repository}"
