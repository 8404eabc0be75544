"""The live page on SGLang's port."""

from idlm_sglang.compat.running import is_isd


def add_live_page(manager, *_) -> None:
    """What: before ``TokenizerManager.set_server_stop_hook`` the routes of the live page join SGLang's app.
    Why: SGLang has no place for a plugin's routes; it calls this last before the app runs, its check of the API key added by then.
    Guard: the hook applied; tests ask for the page, with a key and without.
    Goes when: a plugin may add routes.
    """
    from idlm_sglang.config import handed_down

    if not is_isd() or not handed_down().live_page:
        return
    from sglang.srt.entrypoints.http_server import app

    from idlm_sglang.serving.live.routes import install

    install(app, manager, handed_down())
