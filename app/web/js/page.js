// Parts that all pages share: login, help, keys.

import { getJson, request, ROOT, sendJson, useToken } from "./api.js";
import { byId, el, isTyping } from "./dom.js";

// Time in which an embedding page can send its token. A service without access control needs none.
const TOKEN_MILLISECONDS = 300;
const isEmbedded = window.parent !== window;
// `scopes` null: the service has no access control of its own.
let session = { actor: null, scopes: null, login: "none" };
const isLoggedIn = () => session.login === "none" || Boolean(session.actor);

/** Return who uses the page: {actor, scopes, login}. */
export const getSession = () => session;

/** Return whether the person may do something: send, read, erase. */
export const may = (scope) => session.scopes === null || session.scopes.includes(scope) || session.login === "none";

/** Read the session and show its login. A service without login answers 404. */
export async function startPage() {
  addEventListener("login-needed", showLogin);
  if (isEmbedded) await waitForToken();
  bindHelp();
  try {
    session = await getJson("session");
  } catch (error) {
    if (error.problem?.status !== 404) return;
  }
  if (!isLoggedIn() && !isEmbedded) showLogin();
  showActor();
}

/**
 * Take the token of the embedding page: `frame.contentWindow.postMessage({counterpartToken: "..."}, origin)`.
 * Only listed origins can embed the viewer, so any parent is one of them.
 */
async function waitForToken() {
  await new Promise((resolve) => {
    addEventListener("message", ({ source, data }) => {
      if (source !== window.parent || typeof data?.counterpartToken !== "string") return;
      useToken(data.counterpartToken);
      resolve();
    });
    window.parent.postMessage({ counterpart: "ready" }, "*");
    setTimeout(resolve, TOKEN_MILLISECONDS);
  });
}

function showActor() {
  if (session.login === "none" || !session.actor) return;
  const logOut = async () => {
    await request("session", { method: "DELETE" });
    location.reload();
  };
  byId("account")?.replaceChildren(el("span", { text: session.actor }), el("button", { text: "Log out", on: { click: logOut } }));
}

function showLogin() {
  if (byId("login")) return;
  const dialog = el("dialog", { id: "login", "aria-labelledby": "login-title" });
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  dialog.append(session.login === "oidc" ? oidcLogin() : tokenLogin());
  document.body.append(dialog);
  dialog.showModal();
}

function oidcLogin() {
  return el(
    "div", {},
    el("h2", { id: "login-title", text: "Log in" }),
    el("p", { text: "This service uses the login of your hospital." }),
    el("a", { class: "button primary", href: new URL("login", ROOT).href, text: "Continue to the login" }),
  );
}

function tokenLogin() {
  const field = el("input", { type: "password", id: "login-token", autocomplete: "current-password", required: true });
  const fault = el("p", { class: "fault", role: "alert" });
  const logIn = async (event) => {
    event.preventDefault();
    if (isEmbedded) {
      useToken(field.value);
      byId("login").remove();
      // The session names the reader. If the token is wrong, the login is shown again.
      session = await getJson("session").catch(() => session);
      dispatchEvent(new CustomEvent("logged-in"));
      return;
    }
    try {
      await sendJson("POST", "session", { token: field.value });
      location.reload();
    } catch (error) {
      fault.textContent = error.problem ? `${error.problem.title}. ${error.problem.advice ?? ""}` : "The login failed.";
    }
  };
  return el(
    "form", { on: { submit: logIn } },
    el("h2", { id: "login-title", text: "Log in" }),
    el("label", { for: "login-token", text: "Access token" }), field,
    el("p", { class: "quiet", text: "The browser does not keep the token. It keeps a cookie that scripts cannot read." }),
    fault,
    el("menu", {}, el("button", { class: "primary", text: "Log in" })),
  );
}

function bindHelp() {
  const help = byId("help");
  if (!help) return;
  byId("show-help")?.addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.key === "?" && !isTyping(event) && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      help.showModal();
    }
  });
}

/** Call a function of `bindings` for its key, unless a person types or answers a dialog. */
export function bindKeys(bindings) {
  document.addEventListener("keydown", (event) => {
    const action = bindings[event.key];
    if (!action || isTyping(event) || document.querySelector("dialog[open]")) return;
    if (action(event) !== false) event.preventDefault();
  }, true);
}
