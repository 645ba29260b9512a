"""Ask the server of this container something, with its key: exit code 0 when the answer is 200, 1 when not.

usage: probe.py PATH [FILE_OF_KEYS]

Kubernetes' own HTTP probes would have to be told the key in the open. Standard library alone: it runs every few seconds.
"""

import contextlib
import http.client
import sys

PORT, TIMEOUT_S = 8000, 4


def main(argv: list[str]) -> int:
    path, *files = argv
    headers = {}
    if files:
        with open(files[0], encoding="utf-8") as file:
            headers["Authorization"] = "Bearer " + next(line.strip() for line in file if line.strip())
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)) as connection:
            connection.request("GET", path, headers=headers)
            status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    if status != 200:
        print(f"{path}: {status}", file=sys.stderr)
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
