// Browsers start no worker from a file; where the site is opened as files, the search's worker runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      const load = (address) => new Promise((resolve, reject) => {
        const script = inside.document.createElement("script");
        script.src = new URL(address, url);
        script.onload = resolve;
        script.onerror = reject;
        inside.document.body.appendChild(script);
      });
      inside.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
      inside.postMessage = (data) => this.deliver(this, data);
      load(url).then(() => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      }, () => this.dispatchEvent(new ErrorEvent("error")));
    }

    deliver(target, data) {
      const event = new MessageEvent("message", { data });
      setTimeout(() => {
        target.dispatchEvent(event);
        if (target.onmessage) target.onmessage(event);
      });
    }

    postMessage(data) {
      if (this.ready) this.deliver(this.frame.contentWindow, data);
      else this.waiting.push(data);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
