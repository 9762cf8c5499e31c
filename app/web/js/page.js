// Parts that all pages share: login, help, keys.

import { getJson, request, sendJson } from "./api.js";
import { byId, el, isTyping } from "./dom.js";

let session = { actor: null, scopes: [], login: "none" };
const isLoggedIn = () => session.login === "none" || Boolean(session.actor);

/** Return who uses the page: {actor, scopes, login}. */
export const getSession = () => session;

/** Read the session and show its login. A service without login answers 404. */
export async function startPage() {
  addEventListener("login-needed", showLogin);
  bindHelp();
  try {
    session = await getJson("session");
  } catch (error) {
    if (error.problem?.status !== 404) return;
  }
  if (!isLoggedIn()) showLogin();
  showActor();
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
    el("a", { class: "button primary", href: new URL(session.login_url ?? "session/login", new URL("../../", import.meta.url)).href, text: "Continue to the login" }),
  );
}

function tokenLogin() {
  const field = el("input", { type: "password", id: "login-token", autocomplete: "current-password", required: true });
  const fault = el("p", { class: "fault", role: "alert" });
  const logIn = async (event) => {
    event.preventDefault();
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
    el("p", { class: "quiet", text: "The token stays on the service's side: the browser keeps a cookie that scripts cannot read." }),
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
