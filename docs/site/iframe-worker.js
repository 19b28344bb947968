// Browsers refuse workers to pages opened from disk. There the search runs in a hidden frame instead.
// Zensical takes such a script from another host if the name of this one does not hold `iframe-worker`.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #loaded;

    constructor(url) {
      super();
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const inside = this.#frame.contentWindow;
      inside.postMessage = (data) => {
        const event = new MessageEvent("message", { data: structuredClone(data) });
        this.onmessage?.(event);
        this.dispatchEvent(event);
      };
      const script = inside.document.createElement("script");
      this.#loaded = new Promise((loaded) => (script.onload = loaded));
      script.src = new URL(url, location.href).href;
      inside.document.body.append(script);
    }

    async postMessage(message) {
      // A copy, as a worker gets: the search changes the query it is given, and the field would lose what is typed.
      const data = structuredClone(message);
      await this.#loaded;
      const inside = this.#frame.contentWindow;
      inside?.dispatchEvent(new inside.MessageEvent("message", { data }));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
