"""Upload an artifact to the Hugging Face Hub.

All files are uploaded except reports and measurements, which contain local paths; cptq.json holds
what others need. Files are added to an existing repository, which is not replaced.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from cptq.errors import ArtifactError
from cptq.types import Emit, Progress

#: patterns of files that are not uploaded
KEPT_BACK = ["report.*", "sensitivity/*", "layers.json"]


def check_push(repository: str, token: str | None) -> None:
    """Check that an upload can work, before any other work is done.

    Raises:
        ArtifactError: the Hub is disabled, or there is no token.
    """
    if constants.HF_HUB_OFFLINE:
        raise ArtifactError(
            f"{repository} cannot be uploaded: HF_HUB_OFFLINE is set",
            hint="unset it, or leave out --push-to-hub",
        )
    if not (token or get_token()):
        raise ArtifactError(
            f"{repository} cannot be uploaded without a token",
            hint="log in with `hf auth login`, or set HF_TOKEN",
        )


def push(directory: Path, repository: str, *, token: str | None, emit: Emit) -> str:
    """Create the repository if necessary and upload the directory in one commit.

    Returns:
        The URL of the repository.

    Raises:
        ArtifactError: the upload failed; the local directory is kept.
    """
    emit(Progress(stage="upload", done=0, total=1, message=repository))
    api = HfApi(token=token)
    try:
        address = api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=directory,
            commit_message="Upload a model compressed by cptq",
            ignore_patterns=KEPT_BACK,
        )
    except Exception as error:  # HTTP errors and the Hub's share no base class
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"{repository} could not be uploaded: {words}",
            hint=f"the result is kept in {directory}; try `hf upload {repository} {directory}`",
        ) from error
    emit(Progress(stage="upload", done=1, total=1, message=repository))
    return str(address)
