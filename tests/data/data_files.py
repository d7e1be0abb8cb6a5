"""Small raw files in the layouts that users hand in."""

import zipfile


def movielens_folder(folder, interactions=None, items=None):
    """Write u.data and u.item as GroupLens does: 4 users, 7 items."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = interactions or [
        f"{user}\t{item}\t{1 + (user + item) % 5}\t{880000000 + 10 * step}"
        for user, start in ((1, 1), (2, 2), (3, 1), (4, 3))
        for step, item in enumerate(range(start, start + 5))
    ]
    titles = items or [f"{n}|Film {n}, The (199{n})|01-Jan-1995||http://x|0|1" for n in range(1, 8)]
    (folder / "u.data").write_bytes(("\n".join(rows) + "\n").encode("iso-8859-1"))
    (folder / "u.item").write_bytes(("\n".join(titles) + "\n").encode("iso-8859-1"))
    return folder


def movielens_zip(path, folder, member="ml-100k/", extra=()):
    """Zip such a folder; `extra` are (ZipInfo or name, content)."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("u.data", "u.item"):
            archive.write(folder / name, f"{member}{name}")
        for info, content in extra:
            archive.writestr(info, content)
    return path


def csv_pair(folder, interactions=None, items=None):
    """Write interactions.csv and items.csv: 3 users, 5 items."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = interactions or [
        f"{user},{item},{time}" for user in "abc" for time, item in enumerate(("i1", "i2", "i3", "i4", "i5"))
    ]
    titles = items or [f"i{n},Title {n}" for n in range(1, 6)]
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (folder / "items.csv").write_text("item_id,title\n" + "\n".join(titles) + "\n")
    return {"interactions": str(folder / "interactions.csv"), "items": str(folder / "items.csv")}
