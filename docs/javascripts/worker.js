// Browsers start no worker from a file; where the site is opened as files, the search's worker runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const script = new URL(url, document.baseURI);
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      const load = (address) => new Promise((resolve, reject) => {
        const tag = inside.document.createElement("script");
        tag.src = new URL(address, script);
        tag.onload = resolve;
        tag.onerror = reject;
        inside.document.body.appendChild(tag);
      });
      inside.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
      inside.postMessage = (data) => setTimeout(() => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      });
      load(script).then(() => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      }, () => this.dispatchEvent(new ErrorEvent("error")));
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      if (this.ready) setTimeout(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
      else this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
