"""A pretrained model's folder in Hugging Face's layout: one's own, or the hub's, fetched once.

A hub's model goes to torch's cache, torch.hub.get_dir()/OWNER--MODEL/COMMIT. Every file is checked
against the hash that the hub states before it gets its name; config.json comes last, so a folder
that has it is whole. HF_ENDPOINT names another hub. Left out: access tokens; a model that asks for
one is downloaded by other means and given as a folder.
"""
import hashlib
import json
import os
import re
import socket
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch

from config import UserError
from data.files import write_atomically

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
TIMEOUT = 60        # seconds without a byte after which a download ends
OTHERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")


def find_folder(name):
    """A folder's path, or owner/model on the hub -> its folder."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{name} is neither a folder nor a hub's owner/model")
    folder = Path(torch.hub.get_dir()) / name.replace("/", "--")
    if not list(folder.glob("*/config.json")):
        try:
            fetch(name, folder)
        except (OSError, HTTPException, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name} is no folder here and could not be fetched from {HUB} "
                            f"({error!s:.120}); connect, or download it by other means and name "
                            "its folder") from None
    return next(folder.glob("*/config.json")).parent


def fetch(name, folder):
    """Every file that a model needs, whole and with the hash that the hub states, or an error."""
    socket.setdefaulttimeout(TIMEOUT)       # torch.hub's download has none of its own
    with urllib.request.urlopen(f"{HUB}/api/models/{name}?blobs=true") as answer:
        about = json.load(answer)
    files = {one["rfilename"]: one for one in about["siblings"]}
    if "config.json" not in files:
        raise ValueError("it has no config.json")
    folder = folder / about["sha"]
    folder.mkdir(parents=True, exist_ok=True)
    for file in [*filter(WEIGHTS.fullmatch, files), *(file for file in OTHERS if file in files)]:
        url, path = f"{HUB}/{name}/resolve/{about['sha']}/{file}", folder / file
        if path.exists():
            continue
        print(f"fetching {url}")
        if lfs := files[file].get("lfs"):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=lfs["sha256"])
            continue
        with urllib.request.urlopen(url) as answer:     # small: git's own hash
            content = answer.read()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != files[file]["blobId"]:
            raise ValueError(f"{file} has another hash")
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
