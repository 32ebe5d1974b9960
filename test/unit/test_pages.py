"""The pages in a real browser: headless Chromium, driven by Selenium."""
import io
import os
import shutil

import pytest
from PIL import Image

import report
import visualize

pytestmark = pytest.mark.once

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1250,1000")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver",
     reason="selenium is not installed (the current line's tests have it)")
    if not CHROMIUM or not DRIVER:
        pytest.skip("there is no Chromium with its driver (Debian: apt-get install chromium chromium-driver)")
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split() + ["--user-data-dir={}".format(tmp_path_factory.mktemp("profile"))]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def open_page(browser, path, screenshot):
    """Opens a page, which must load without a word in the console and fetch nothing; returns [(alt, width, height)] of
    its pictures as they are drawn. The whole page's screenshot goes to the file `screenshot`."""
    browser.get_log("browser")
    browser.get("file://" + str(path))
    assert browser.get_log("browser") == []
    assert browser.execute_script(
        "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    height = browser.execute_script("return document.documentElement.scrollHeight")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1250
    browser.set_window_size(1250, min(height + 200, 8000))
    browser.save_screenshot(str(screenshot))
    return browser.execute_script(
        "return Array.from(document.images).map(i => [i.alt, i.complete ? i.naturalWidth : 0, i.clientHeight])")


def colours(screenshot):
    with open(str(screenshot), "rb") as f:
        return len(Image.open(io.BytesIO(f.read())).convert("RGB").getcolors(2 ** 24))


def test_the_page_of_tokens(browser, student, tmp_path):
    visualize.main(["--resume", os.path.join(student[0], "best_checkpoint.pth"),
                   "--count", "3", "--output_dir", str(tmp_path)])
    pictures = open_page(browser, tmp_path / "index.html", tmp_path / "tokens.png")
    assert len(pictures) == 6 and all(width > 500 and height > 200 for _, width, height in pictures)
    assert [alt.split(":")[0] for alt, _, _ in pictures][:2] == [
                      "0 (class digit0), stage-wise", "0 (class digit0), layer-wise"]
    assert colours(tmp_path / "tokens.png") > 500


def test_the_page_of_curves(browser, student, tmp_path):
    report.main([student[0], student[0], "--output", str(tmp_path / "report.html")])
    pictures = open_page(browser, tmp_path / "report.html", tmp_path / "curves.png")
    assert len(pictures) == 7 and all(width > 300 and height > 100 for _, width, height in pictures)
    assert colours(tmp_path / "curves.png") > 100
    assert "They do not differ." in browser.find_element("tag name", "body").text
    assert "stage_wise_epoch" not in browser.find_element("tag name", "body").text  # folded away
    browser.execute_script("document.querySelector('details').open = true")
    assert "stage_wise_epoch" in browser.find_element("tag name", "body").text


def test_the_browser_test_sees_what_is_wrong_with_a_page(browser, tmp_path):
    (tmp_path / "bad.html").write_text('<!DOCTYPE html><html><body><img alt="x" src="data:image/png;base64,AAAA">'
                                       '<script>console.error("wrong")</script></body></html>')
    with pytest.raises(AssertionError):
        open_page(browser, tmp_path / "bad.html", tmp_path / "bad.png")
    (tmp_path / "bad.html").write_text('<!DOCTYPE html><html><head><link rel="icon" href="data:,"></head><body>'
                                       '<img alt="x" src="data:image/png;base64,AAAA"></body></html>')
    assert open_page(browser, tmp_path / "bad.html", tmp_path / "bad.png")[0][1] == 0
