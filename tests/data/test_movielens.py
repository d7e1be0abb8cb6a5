"""MovieLens 100K: where it is found, what is refused, how it is downloaded."""

import hashlib
import stat
import zipfile

import pytest
from data_files import movielens_folder, movielens_zip

from llm2rec.core.errors import DataError
from llm2rec.data import MovieLens100K, prepare


@pytest.fixture
def folder(tmp_path):
    return movielens_folder(tmp_path / "ml-100k")


def test_folder_parent_folder_and_zip_read_the_same(folder, tmp_path):
    archive = movielens_zip(tmp_path / "some.zip", folder)
    flat = movielens_zip(tmp_path / "flat.zip", folder, member="")
    raws = [MovieLens100K(raw_dir=str(path)).read() for path in (folder, tmp_path, archive, flat)]
    for raw in raws[1:]:
        assert raw.interactions.equals(raws[0].interactions)
        assert raw.items.equals(raws[0].items)
    first = raws[0].interactions.iloc[0]
    assert (first.user_id, first.item_id, first.timestamp, first.rating) == ("1", "1", 880000000, 3.0)
    assert raws[0].items.title[0] == "Film 1, The (1991)"


def test_titles_are_read_as_latin_1(tmp_path):
    titles = [f"{n}|Misérables {n} (1995)|x" for n in range(1, 8)]
    assert (
        MovieLens100K(raw_dir=str(movielens_folder(tmp_path, items=titles))).read().items.title[0].startswith("Misér")
    )


@pytest.mark.parametrize(
    "bad", ["1\t2\t3", "1\t2\t3\t4\t5", "1\t2\tthree\t4", "1\t2\t9\t4", "\t2\t3\t4", "1\t2\t3\tnoon", "1 2 3 4"]
)
def test_malformed_rating_names_file_and_line(tmp_path, bad):
    movielens_folder(tmp_path, interactions=["1\t1\t5\t880000000", bad])
    with pytest.raises(DataError, match=r"u\.data, line 2: .* expected user, item, rating"):
        MovieLens100K(raw_dir=str(tmp_path)).read()


def test_malformed_movie_and_duplicate_movie_name_file_and_line(tmp_path):
    movielens_folder(tmp_path, items=["1|One (1991)|x", "2"])
    with pytest.raises(DataError, match=r"u\.item, line 2: '2' is not a movie"):
        MovieLens100K(raw_dir=str(tmp_path)).read()
    movielens_folder(tmp_path, items=["1|One (1991)|x", "1|Again|x"])
    with pytest.raises(DataError, match=r"u\.item, line 2: item '1' occurs twice"):
        MovieLens100K(raw_dir=str(tmp_path)).read()


def test_rating_of_a_movie_without_title_row_is_refused(tmp_path):
    movielens_folder(tmp_path / "raw", items=[f"{n}|Film {n}|x" for n in range(2, 8)])
    with pytest.raises(DataError, match=r"2 interactions name 1 items .*'1'"):
        prepare(MovieLens100K(raw_dir=str(tmp_path / "raw")), tmp_path / "processed")


def test_missing_raw_data_names_both_ways(tmp_path):
    with pytest.raises(DataError, match=r"does not exist: .*nowhere.*connect to the network.*dataset\.raw_dir="):
        MovieLens100K(raw_dir=str(tmp_path / "nowhere")).read()
    with pytest.raises(DataError, match=r"holds no u\.data and u\.item"):
        MovieLens100K(raw_dir=str(tmp_path)).read()


@pytest.mark.parametrize("settings", [{"download": False}, {"url": "http://127.0.0.1:9/ml-100k.zip"}])
def test_no_download_names_both_ways(tmp_path, settings):
    with pytest.raises(DataError, match=r"connect to the network.*dataset\.raw_dir="):
        prepare(MovieLens100K(**settings), tmp_path / "processed", tmp_path / "raw")
    assert not list(tmp_path.glob("raw/*"))


def test_download_is_checked_kept_and_used_again(folder, tmp_path):
    archive = movielens_zip(tmp_path / "published.zip", folder)
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    spec = MovieLens100K(url=archive.as_uri(), md5=md5)
    data = prepare(spec, tmp_path / "processed", tmp_path / "raw")
    assert len(data.sequences) == 4
    archive.unlink()
    assert prepare(spec, tmp_path / "elsewhere", tmp_path / "raw").fingerprint == data.fingerprint


def test_download_with_wrong_checksum_is_not_kept(folder, tmp_path):
    archive = movielens_zip(tmp_path / "published.zip", folder)
    with pytest.raises(DataError, match=r"has md5 [0-9a-f]{32}, expected 0e33842e"):
        prepare(MovieLens100K(url=archive.as_uri()), tmp_path / "processed", tmp_path / "raw")
    assert not list(tmp_path.glob("raw/*"))


@pytest.mark.parametrize("name", ["../evil", "ml-100k/../../evil", "/etc/evil", "..\\evil", "C:\\evil"])
def test_zip_member_that_escapes_is_refused(folder, tmp_path, name):
    archive = movielens_zip(tmp_path / "bad.zip", folder, extra=[(name, "x")])
    with pytest.raises(DataError, match=r"points outside the archive's own folder"):
        MovieLens100K(raw_dir=str(archive)).read()


def test_zip_member_that_is_a_link_is_refused(folder, tmp_path):
    link = zipfile.ZipInfo("ml-100k/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = movielens_zip(tmp_path / "bad.zip", folder, extra=[(link, "/etc/passwd")])
    with pytest.raises(DataError, match="is a symbolic link"):
        MovieLens100K(raw_dir=str(archive)).read()


def test_file_that_is_no_zip_and_zip_without_members_are_refused(folder, tmp_path):
    (tmp_path / "no.zip").write_text("not a zip")
    with pytest.raises(DataError, match="is not a readable zip"):
        MovieLens100K(raw_dir=str(tmp_path / "no.zip")).read()
    with pytest.raises(DataError, match=r"holds 0 members called u\.data"):
        MovieLens100K(raw_dir=str(movielens_zip(tmp_path / "other.zip", folder, member="other/"))).read()
